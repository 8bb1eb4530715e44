"""DeepSeek-V4's prompt encoding (spec section 9), from parsed messages to tokens.

    BOS [effort] system { <User> text <Assistant> [<think> reasoning] </think> content [calls] EOS }

- An answer begins behind `<Assistant><think>` (thinking) or `<Assistant></think>` (not).
- Tool results are no turns of their own: they stand in a user's turn, in the order of the calls.
- Earlier reasoning is left out (`drop_thinking`) unless the conversation has tools.

Texts between control tokens are encoded in one piece, as the release does, except that a text of
`LONG_CHARS` characters or more is a piece of its own: its ids are remembered, and a state is kept
behind it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from penstock.chat import dsml
from penstock.chat.encoder import (
    LONG_CHARS,
    AnswerForm,
    ChatOptions,
    Encoded,
    Segment,
    SegmentEncoder,
)
from penstock.chat.messages import (
    ALL_ROLES,
    Message,
    ToolCall,
    check_answerable,
    check_tool_results,
    read_messages,
    read_tools,
)
from penstock.chat.prompts import Prompts, Template, missing
from penstock.errors import InvalidRequestError
from penstock.tokenizer import Tokenizer

BOS = "<\uff5cbegin\u2581of\u2581sentence\uff5c>"
EOS = "<\uff5cend\u2581of\u2581sentence\uff5c>"
USER = "<\uff5cUser\uff5c>"
ASSISTANT = "<\uff5cAssistant\uff5c>"
REMINDER = "<\uff5clatest_reminder\uff5c>"
THINK, END_THINK = "<think>", "</think>"
TASKS = {
    name: f"<\uff5c{name}\uff5c>"
    for name in ("action", "query", "authority", "domain", "title", "read_url")
}
NEEDED = (BOS, EOS, USER, ASSISTANT, END_THINK)
"""Without these a tokenizer is not DeepSeek's; the others are asked for when they are needed."""
_BRINGS_TOOLS = ("system", "developer")
_ANY_CONTROL = re.compile(
    "|".join(map(re.escape, (*NEEDED, REMINDER, THINK, dsml.MARK, *TASKS.values())))
)


@dataclass(frozen=True)
class Rules:
    """How a conversation is written."""

    prompts: Prompts
    thinking: bool = False
    drop_thinking: bool = True
    effort: str | None = None


@dataclass(frozen=True)
class _Block:
    """A part of a user's turn: text, or the result of a call."""

    text: str
    answers: str | None = None


@dataclass(frozen=True)
class _Turn:
    """A message, or several of a user's and tools' merged into one."""

    role: str
    blocks: tuple[_Block, ...]
    reasoning: str = ""
    calls: tuple[ToolCall, ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()
    response_format: Mapping[str, Any] | None = None
    task: str | None = None
    open_end: bool = False


class DeepSeekV4Chat(SegmentEncoder):
    """`ChatEncoder` of a DeepSeek-V4 checkpoint."""

    def __init__(self, tokenizer: Tokenizer, prompts: Prompts | None = None) -> None:
        super().__init__(tokenizer)
        self._prompts = prompts or Prompts()

    @property
    def start_ids(self) -> tuple[int, ...]:
        return (self.control(BOS),)

    def encode(
        self,
        messages: Sequence[Mapping[str, Any]],
        options: ChatOptions | None = None,
        *,
        scope: bytes = b"",
    ) -> Encoded:
        options = options or ChatOptions()
        read = read_messages(messages, ALL_ROLES)
        check_answerable(read)
        check_tool_results(read)
        read = _with_options(read, options)
        thinking = _thinking(options)
        rules = Rules(
            self._prompts,
            thinking=thinking,
            drop_thinking=options.drop_thinking is not False,
            effort=options.effort if thinking else None,
        )
        pieces = list(segments(read, rules))
        if read[-1].role == "system":
            # The release writes no answer's beginning here; an answer is what was asked for.
            pieces += _opening(thinking)
        self._check_tokens(pieces)
        ids, boundaries = self.encode_segments(_runs(pieces), scope)
        form = AnswerForm(
            thinking=thinking and read[-1].task is None,
            calls=any(message.tools for message in read),
            thinking_ends=self.control(END_THINK),
        )
        return Encoded(ids, boundaries, form)

    def _check_tokens(self, pieces: Iterable[Segment]) -> None:
        for spelling in {piece.text for piece in pieces if piece.control}:
            if self._tokenizer.token_id(spelling) is None:
                raise InvalidRequestError(
                    f"this request needs the token {spelling!a}, which the model's tokenizer.json "
                    "does not have",
                    param="messages",
                    code="unsupported_value",
                )


def segments(messages: Sequence[Message], rules: Rules) -> Iterator[Segment]:
    """The whole prompt in pieces. Joined texts are what the release's encoder writes."""
    turns = _in_call_order(_merged(messages))
    drop = rules.drop_thinking and not any(turn.tools for turn in turns)
    if drop and rules.thinking:
        turns = _without_old_thoughts(turns)
    last_user = _last_user(turns)
    yield Segment(BOS, control=True)
    if rules.thinking:
        yield from _ours(rules.prompts.paragraph(rules.effort))
    for i, turn in enumerate(turns):
        if turn.role == "assistant":
            task_before = i > 0 and turns[i - 1].task is not None
            thought = rules.thinking and not task_before and (not drop or i > last_user)
            yield from _answer(turn, thought)
        else:
            yield from _question(turn, rules.prompts)
        following = turns[i + 1].role if i + 1 < len(turns) else None
        if following in (None, "assistant", "latest_reminder"):
            yield from _transition(turn, rules.thinking, not drop or i >= last_user)


def _question(turn: _Turn, prompts: Prompts) -> Iterator[Segment]:
    """All but an assistant's turn."""
    if turn.role in ("user", "developer"):
        yield Segment(USER, control=True)
    elif turn.role == "latest_reminder":
        yield Segment(REMINDER, control=True)
    for i, block in enumerate(turn.blocks):
        yield Segment("\n\n" if i else "")
        if block.answers is not None:
            yield Segment("<tool_result>")
        yield Segment(block.text)
        if block.answers is not None:
            yield Segment("</tool_result>")
    if turn.tools:
        if prompts.tools is None:
            raise missing("tools", "TOOLS_TEMPLATE", "tools")
        lines = "\n".join(dsml.to_json(tool["function"]) for tool in turn.tools)
        yield Segment("\n\n")
        yield from _filled(prompts.tools, {"tool_schemas": lines})
    if turn.response_format:
        if prompts.response_format is None:
            raise missing("response_format", "response_format_template", "response_format")
        yield Segment("\n\n")
        schema = {"schema": dsml.to_json(turn.response_format)}
        yield from _filled(prompts.response_format, schema)
    yield Segment("", ends_message=True)


def _answer(turn: _Turn, thought: bool) -> Iterator[Segment]:
    if thought:
        yield Segment(turn.reasoning)
        yield Segment(END_THINK, control=True)
    for block in turn.blocks:
        yield Segment(block.text)
    if turn.calls:
        yield from dsml.write_calls(turn.calls)
    if not turn.open_end:
        yield Segment(EOS, control=True, ends_message=True)


def _transition(turn: _Turn, thinking: bool, recent: bool) -> Iterator[Segment]:
    """From a turn to the answer behind it."""
    if turn.task is not None:
        if turn.task == "action":
            yield from _opening(thinking)
        yield Segment(TASKS[turn.task], control=True)
    elif turn.role in ("user", "developer"):
        yield from _opening(thinking and recent)


def _opening(thinking: bool) -> Iterator[Segment]:
    yield Segment(ASSISTANT, control=True)
    yield Segment(THINK if thinking else END_THINK, control=True)


def _filled(template: Template, texts: Mapping[str, str]) -> Iterator[Segment]:
    controls = {
        "dsml_token": dsml.MARK,
        "thinking_start_token": THINK,
        "thinking_end_token": END_THINK,
    }
    for literal, key in template.parts:
        yield from _ours(literal)
        if key in controls:
            yield Segment(controls[key], control=True)
        elif key is not None:
            yield Segment(texts[key])


def _ours(text: str) -> Iterator[Segment]:
    """Text of the checkpoint's publisher: control tokens that it spells are meant."""
    at = 0
    for match in _ANY_CONTROL.finditer(text):
        yield Segment(text[at : match.start()])
        yield Segment(match[0], control=True)
        at = match.end()
    yield Segment(text[at:])


def _with_options(messages: list[Message], options: ChatOptions) -> list[Message]:
    """The request's tools go to a leading system or developer message, its task to the last one."""
    for i, message in enumerate(messages):
        if message.task is not None and message.task not in TASKS:
            raise _unknown_task(message.task, f"messages[{i}].task")
        if message.role == "developer" and not message.text:
            raise InvalidRequestError(
                f"messages[{i}].content is empty, which a developer's message may not be",
                param=f"messages[{i}].content",
            )
        if (message.tools or message.response_format) and message.role not in _BRINGS_TOOLS:
            raise InvalidRequestError(
                f"messages[{i}] has tools or a response_format, but only messages of "
                f"{' or '.join(_BRINGS_TOOLS)} may",
                param=f"messages[{i}]",
            )
    asked = read_tools(options.tools)
    if asked:
        if messages[0].role not in _BRINGS_TOOLS:
            messages = [Message("system"), *messages]
        tools = (*messages[0].tools, *asked)
        messages = [replace(messages[0], tools=tools), *messages[1:]]
    if options.task is not None:
        if options.task not in TASKS:
            raise _unknown_task(options.task, "chat_template_kwargs.task")
        messages = [*messages[:-1], replace(messages[-1], task=options.task)]
    return messages


def _unknown_task(task: str, place: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"{place} must be one of {', '.join(TASKS)}, not {task[:40]!a}", param=place
    )


def _thinking(options: ChatOptions) -> bool:
    if options.effort is None:
        return bool(options.thinking)
    wanted = options.effort != "none"
    if options.thinking is not None and options.thinking != wanted:
        raise InvalidRequestError(
            f"reasoning_effort is {options.effort[:40]!a} but chat_template_kwargs says thinking "
            f"{str(options.thinking).lower()}; leave one of them out",
            param="reasoning_effort",
        )
    return wanted


def _merged(messages: Sequence[Message]) -> list[_Turn]:
    """Neighbouring messages of user and tools become one turn; a task ends its turn."""
    turns: list[_Turn] = []
    for message in messages:
        result = message.role == "tool"
        block = _Block(message.text, message.answers if result else None)
        joins = result or message.role == "user"
        last = turns[-1] if turns else None
        if joins and last and last.role == "user" and (result or last.task is None):
            blocks = (*last.blocks, block)
            turns[-1] = replace(last, blocks=blocks, task=message.task or last.task)
        else:
            brings = message.role in _BRINGS_TOOLS
            turns.append(
                _Turn(
                    "user" if joins else message.role,
                    (block,),
                    reasoning=message.reasoning,
                    calls=message.calls,
                    tools=message.tools if brings else (),
                    response_format=message.response_format if brings else None,
                    task=message.task,
                    open_end=message.open_end,
                )
            )
    return turns


def _in_call_order(turns: Sequence[_Turn]) -> list[_Turn]:
    """Results among themselves in the order of the calls; texts keep their places."""
    ordered: list[_Turn] = []
    order: dict[str, int] = {}
    for turn in turns:
        if turn.calls:
            order = {call.call_id: i for i, call in enumerate(turn.calls) if call.call_id}
        results = [block for block in turn.blocks if block.answers is not None]
        if len(results) > 1:
            results.sort(key=lambda block: order.get(block.answers or "", 0))
            following = iter(results)
            blocks = tuple(b if b.answers is None else next(following) for b in turn.blocks)
            turn = replace(turn, blocks=blocks)
        ordered.append(turn)
    return ordered


def _without_old_thoughts(turns: Sequence[_Turn]) -> list[_Turn]:
    """Before the last question developer messages go, too."""
    last = _last_user(turns)
    return [turn for i, turn in enumerate(turns) if i >= last or turn.role != "developer"]


def _last_user(turns: Sequence[_Turn]) -> int:
    return max((i for i, t in enumerate(turns) if t.role in ("user", "developer")), default=-1)


def _runs(pieces: Iterable[Segment]) -> Iterator[Segment]:
    """Neighbouring texts joined, up to control tokens and long texts."""
    held: list[str] = []
    ends = False
    for piece in pieces:
        if not piece.control and len(piece.text) < LONG_CHARS:
            held.append(piece.text)
            ends = piece.ends_message
            continue
        if held:
            yield Segment("".join(held), ends)
            held, ends = [], False
        yield piece if piece.control else replace(piece, ends_message=True)
    if held:
        yield Segment("".join(held), ends)
