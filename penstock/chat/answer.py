"""Answers of DeepSeek-V4 taken apart while they are written: reasoning, content, tool calls.

    reasoning </think> content [blank line, tool calls in DSML]

The rules are the release's (spec section 9): strict, nothing guessed. Where its parser raises, this
one gives the text back: markup that is not exactly right becomes content, from the first call that
is not whole on, so nothing that the model wrote is lost. A call is told when its last tag has been
read: a client never sees half of one, and its arguments are always a JSON object.

The result depends on the text alone, not on how it is cut into pieces.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from penstock.chat import dsml
from penstock.chat.encoder import AnswerForm
from penstock.chat.messages import ToolCall

END_THINK = "</think>"
BLOCK = f"\n\n<{dsml.MARK}{dsml.CALLS}"
_INVOKE = f'<{dsml.MARK}{dsml.INVOKE} name="'
_PARAMETER = f'<{dsml.MARK}{dsml.PARAMETER} name="'
_END_PARAMETER = f"</{dsml.MARK}{dsml.PARAMETER}>"
_END_INVOKE = f"</{dsml.MARK}{dsml.INVOKE}>\n"
_LONGEST_NAME = 1024
_END_BLOCK = f"</{dsml.MARK}{dsml.CALLS}>"


@dataclass(frozen=True)
class Reasoning:
    text: str


@dataclass(frozen=True)
class Content:
    text: str


@dataclass(frozen=True)
class Call:
    """A whole tool call; `index` counts from 0."""

    index: int
    name: str
    arguments: str


Part = Reasoning | Content | Call


@dataclass(frozen=True)
class Answer:
    """A whole answer."""

    reasoning: str = ""
    content: str = ""
    calls: tuple[ToolCall, ...] = ()


class AnswerReader:
    """Takes one answer's text piece by piece. `feed` any number of times, then `close` once."""

    def __init__(self, form: AnswerForm) -> None:
        self._calls_allowed = form.calls
        self._held = ""
        self._step: Callable[[], list[Part] | None] = (
            self._reasoning if form.thinking else self._content
        )
        self._call = _CallReader(start=len(BLOCK), opening=True)
        self.calls = 0
        """Calls told so far."""

    @property
    def thinking(self) -> bool:
        """Still in the reasoning."""
        return self._step == self._reasoning

    def feed(self, text: str) -> list[Part]:
        """What is certain with this text."""
        if not text:
            return []
        self._held += text
        return self._run()

    def close(self) -> list[Part]:
        """What was held back: the answer ends here."""
        held, self._held = self._held, ""
        if not held:
            return []
        return [Reasoning(held) if self.thinking else Content(held)]

    def _run(self) -> list[Part]:
        parts: list[Part] = []
        # A step that returns None has done what it can with the text so far.
        while (found := self._step()) is not None:
            parts += found
        return parts + self._certain()

    def _certain(self) -> list[Part]:
        """Text that cannot belong to a mark that is still being written."""
        if self._step == self._reasoning:
            text = self._take(END_THINK)
            return [Reasoning(text)] if text else []
        if self._step == self._content:
            text = self._take(BLOCK if self._calls_allowed else "")
            return [Content(text)] if text else []
        return []

    def _take(self, mark: str) -> str:
        keep = _beginning(self._held, mark)
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return text

    def _reasoning(self) -> list[Part] | None:
        at = self._held.find(END_THINK)
        if at < 0:
            return None
        text, self._held = self._held[:at], self._held[at + len(END_THINK) :]
        self._step = self._content
        return [Reasoning(text)] if text else []

    def _content(self) -> list[Part] | None:
        at = self._held.find(BLOCK) if self._calls_allowed else -1
        if at < 0:
            return None
        text, self._held = self._held[:at], self._held[at:]
        self._step = self._block
        return [Content(text)] if text else []

    def _block(self) -> list[Part] | None:
        state = self._call.read(self._held)
        if state == _MORE:
            return None
        if state == _CALL:
            self._held = self._held[self._call.at :]
            told = Call(self.calls, self._call.name, self._call.arguments)
            self.calls += 1
            self._call = _CallReader(start=0, opening=False)
            return [told]
        if state == _END:
            self._held = self._held[self._call.at :]
        # Behind the block, and from markup that is wrong on, all is content.
        self._step, self._calls_allowed = self._content, False
        return []


_MORE, _CALL, _END, _WRONG = "more", "call", "end", "wrong"


class _CallReader:
    """One call out of a block that is still growing. Looks at each character a bounded number of
    times, however small the pieces are.
    """

    def __init__(self, *, start: int, opening: bool) -> None:
        self.at = start
        """How far the text has been understood."""
        self.name = ""
        self._parameters: dict[str, str] = {}
        self._key = ""
        self._is_text = False
        self._searched = start
        self._first = opening
        self._step: Callable[[str], str] = self._open if opening else self._item

    @property
    def arguments(self) -> str:
        """A JSON object, written as the release's parser writes it."""
        pairs = (f"{dsml.to_json(key)}: {value}" for key, value in self._parameters.items())
        return "{" + ", ".join(pairs) + "}"

    def read(self, text: str) -> str:
        """`_MORE` (text is missing), `_CALL` (whole up to `at`), `_END` (of the block) or `_WRONG`.

        `text` begins where this reader began, and only grows from call to call.
        """
        while not (state := self._step(text)):
            continue
        return state

    def _expect(self, text: str, *options: str) -> str | None:
        """The option that stands here, "" if none can, None while that is open."""
        for option in options:
            if text.startswith(option, self.at):
                self.at += len(option)
                self._searched = self.at
                return option
        rest = text[self.at : self.at + max(map(len, options))]
        return None if any(option.startswith(rest) for option in options) else ""

    def _until(self, text: str, end: str) -> str | None:
        """Text up to `end`, which is consumed; None if it is not there yet."""
        found = text.find(end, self._searched)
        if found < 0:
            self._searched = max(self.at, len(text) - len(end) + 1)
            return None
        value = text[self.at : found]
        self.at = self._searched = found + len(end)
        return value

    def _open(self, text: str) -> str:
        found = self._expect(text, ">\n")
        self._step = self._item
        return "" if found else self._missing(found, self._open)

    def _item(self, text: str) -> str:
        found = self._expect(text, _INVOKE, _END_BLOCK)
        if found == _END_BLOCK:
            # A block without a call is none.
            return _WRONG if self._first else _END
        self._step = self._header
        return "" if found else self._missing(found, self._item)

    def _header(self, text: str) -> str:
        name = self._line(text, '">\n')
        if not name:
            return self._missing(name, self._header)
        self.name = name
        self._step = self._first_parameter
        return ""

    def _first_parameter(self, text: str) -> str:
        """An empty list of parameters leaves an empty line."""
        return self._parameter_or(text, "\n" + _END_INVOKE, _END_INVOKE)

    def _next_parameter(self, text: str) -> str:
        return self._parameter_or(text, _END_INVOKE)

    def _parameter_or(self, text: str, *ends: str) -> str:
        step = self._step
        found = self._expect(text, _PARAMETER, *ends)
        if found in ends:
            return _CALL
        self._step = self._parameter
        return "" if found else self._missing(found, step)

    def _parameter(self, text: str) -> str:
        key = self._line(text, '" string="')
        if not key or key in self._parameters:
            return self._missing(None if key is None else "", self._parameter)
        self._key = key
        self._step = self._kind
        return ""

    def _kind(self, text: str) -> str:
        found = self._expect(text, 'true">', 'false">')
        self._is_text = found == 'true">'
        self._step = self._value
        return "" if found else self._missing(found, self._kind)

    def _value(self, text: str) -> str:
        value = self._until(text, _END_PARAMETER)
        if value is None:
            return _MORE
        if not self._is_text and not _is_json(value):
            return _WRONG
        self._parameters[self._key] = dsml.to_json(value) if self._is_text else value
        self._step = self._line_end
        return ""

    def _line_end(self, text: str) -> str:
        found = self._expect(text, "\n")
        self._step = self._next_parameter
        return "" if found else self._missing(found, self._line_end)

    def _line(self, text: str, end: str) -> str | None:
        """A name: what stands before `end` on this line; "" if the line breaks before."""
        name = self._until(text, end)
        seen = text[self.at : len(text) - len(end) + 1] if name is None else name
        if '"' in seen or "\n" in seen or len(seen) > _LONGEST_NAME:
            return ""
        return name

    def _missing(self, found: str | None, step: Callable[[str], str]) -> str:
        self._step = step
        return _MORE if found is None else _WRONG


def read_answer(text: str, form: AnswerForm) -> Answer:
    """A whole answer at once."""
    reader = AnswerReader(form)
    return fold([*reader.feed(text), *reader.close()])


def fold(parts: Sequence[Part]) -> Answer:
    """Parts of one answer, joined."""
    return Answer(
        "".join(part.text for part in parts if isinstance(part, Reasoning)),
        "".join(part.text for part in parts if isinstance(part, Content)),
        tuple(ToolCall(p.name, p.arguments) for p in parts if isinstance(p, Call)),
    )


def _is_json(text: str) -> bool:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    try:
        json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError):
        return False
    return True


def _beginning(text: str, mark: str) -> int:
    """Length of the longest end of `text` that begins `mark` without being all of it."""
    for length in range(min(len(mark) - 1, len(text)), 0, -1):
        if mark.startswith(text[len(text) - length :]):
            return length
    return 0
