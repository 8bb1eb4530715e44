"""`grounding: "strict"`: an answer that its evidence does not contain becomes the model's refusal.

The answer is held back until it is whole and checked; then it goes on exactly as the model wrote
it, or the refusal goes in its place. No other text is ever put there. `docs/evidence.md` has the
rule.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any, cast

from cluster.api.errors import ForbiddenValueError
from decode.evidence import AnswerEvidence, Span
from penstock.chat.answer import END_THINK, AnswerReader, Content, Reasoning
from penstock.chat.encoder import AnswerForm
from penstock.errors import InvalidRequestError
from penstock.request import Event, Finish, TokenChunk
from penstock.tokenizer import Tokenizer

LEAST_WEIGHT = 0.05
"""Mean attention of the answer's tokens below which a span supports nothing."""
MOST_HELD_TOKENS = 8192
_WORD_TOKENS = 8
"""How far a span is widened, so that a word at its edge is whole."""
_EDGES = " \t\r\n.,;:!?\"'`()[]{}*_"


def check_combination(body: Any) -> None:
    """Raises for wishes that a withheld answer could not fulfil, or that would give it away."""
    format_kind = (getattr(body, "response_format", None) or {}).get("type", "text")
    tools = getattr(body, "tools", None) and getattr(body, "tool_choice", None) != "none"
    wrong = {
        "tools": bool(tools),
        "response_format": format_kind != "text",
        "logprobs": getattr(body, "logprobs", None) not in (None, False),
        "logits_digest": bool(body.logits_digest),
        "echo": bool(getattr(body, "echo", None)),
    }
    for name, asked in wrong.items():
        if asked:
            raise InvalidRequestError(
                f"grounding 'strict' cannot be combined with {name}; leave one of them out",
                param=name,
            )


def refusal_of(refusal: str | None) -> str:
    """Raises if the model names none."""
    if refusal is None:
        raise ForbiddenValueError(
            "grounding 'strict' answers with the model's refusal, and this model names none; put "
            '"penstock": {"refusal": "TEXT"} into its config.json',
            param="grounding",
        )
    return refusal


class Grounding:
    """Checks one answer. `events` once, then `told`."""

    def __init__(
        self, *, refusal: str, form: AnswerForm, tokenizer: Tokenizer, prompt: Sequence[int]
    ) -> None:
        self._refusal, self._form = refusal, form
        self._tokenizer, self._prompt = tokenizer, prompt
        self._evidence = AnswerEvidence()
        self._held: list[TokenChunk] | None = []
        self._tokens = 0
        self._told: dict[str, Any] = {}

    @property
    def told(self) -> dict[str, Any]:
        """What the response says of it."""
        return self._told

    async def events(self, source: AsyncIterator[Event]) -> AsyncIterator[Event]:
        """Progress as it comes; tokens only after the last one."""
        async with aclosing(cast(Any, source)) as events:
            async for event in events:
                if isinstance(event, TokenChunk):
                    self._hold(event)
                elif isinstance(event, Finish):
                    for checked in self._checked(event):
                        yield checked
                    return
                else:
                    yield event

    def _hold(self, chunk: TokenChunk) -> None:
        self._tokens += len(chunk.token_ids)
        self._evidence.add(chunk.evidence, len(chunk.token_ids))
        if self._held is not None:
            self._held.append(chunk)
            if self._tokens > MOST_HELD_TOKENS:
                # No span is that long: nothing of it will be shown.
                self._held = None

    def _checked(self, finish: Finish) -> list[Event]:
        held = self._held
        content = None if held is None else self._content(held, finish)
        refused = content is not None and _plain(content) == _plain(self._refusal)
        span = None if refused or content is None else self.support(content)
        self._told = {
            "mode": "strict",
            "verdict": "refused" if refused else "withheld" if span is None else "supported",
            "buffered": True,
        }
        if held is not None and (refused or span is not None):
            if span is not None:
                self._told["support"] = {"start": span.start, "end": span.end}
            return [*held, finish]
        self._told["withheld"] = {
            "completion_tokens": finish.usage.completion_tokens,
            "finish_reason": finish.reason,
        }
        text = END_THINK + self._refusal if self._form.thinking else self._refusal
        # Ids and evidence stay the true ones; of the text nothing does.
        first, *rest = held or [TokenChunk(0, (), "")]
        chunks = [replace(first, text=text), *(replace(chunk, text="") for chunk in rest)]
        return [*chunks, replace(finish, reason="stop", text="")]

    def _content(self, held: list[TokenChunk], finish: Finish) -> str | None:
        """What a client would read as the answer; None if some of it is no text."""
        text = "".join(chunk.text for chunk in held) + finish.text
        if self._form.plain:
            return text
        reader = AnswerReader(self._form)
        parts = [*reader.feed(text), *reader.close()]
        if not all(isinstance(part, Content | Reasoning) for part in parts):
            return None
        return "".join(part.text for part in parts if isinstance(part, Content))

    def support(self, answer: str) -> Span | None:
        """The heaviest span that contains the answer."""
        wanted = _plain(answer)
        if not wanted:
            return None
        # A number is not contained in a longer one: 12 not in 112, 12.5 or -12.
        before = r"(?<![\w])" + (r"(?<!\d[.,])(?<![-+])" if wanted[0].isdigit() else "")
        behind = r"(?![\w])" + (r"(?![.,]\d)" if wanted[-1].isdigit() else "")
        pattern = re.compile(before + re.escape(wanted) + behind)
        for span in self._evidence.spans():
            if self._evidence.weight(span) < LEAST_WEIGHT:
                continue
            if pattern.search(_spaced(self._widened(span))):
                return span
        return None

    def _widened(self, span: Span) -> str:
        """The span's text with the words at its edges whole."""
        ids, read = self._prompt, self._tokenizer.decode_bytes
        left = re.search(rb"\S*\Z", read(ids[max(span.start - _WORD_TOKENS, 0) : span.start]))
        right = re.match(rb"\S*", read(ids[span.end : span.end + _WORD_TOKENS]))
        core = read(ids[span.start : span.end])
        whole = (left[0] if left else b"") + core + (right[0] if right else b"")
        return whole.decode("utf-8", errors="replace")


def _spaced(text: str) -> str:
    """Without case, compatibility forms and differences of white space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _plain(text: str) -> str:
    return _spaced(text).strip(_EDGES)
