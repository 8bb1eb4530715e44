"""An answer that has parts (reasoning, content, tool calls) on its way into OpenAI's shapes.

Answers of models without such parts do not pass here: their text is their content.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

from penstock.chat.answer import AnswerReader, Call, Content, Part, Reasoning
from penstock.chat.encoder import AnswerForm
from penstock.request import Finish, TokenChunk


class AnswerParts:
    """Deltas of one answer for a stream, and their sum for a whole response."""

    def __init__(self, form: AnswerForm) -> None:
        self._form = form
        self._reader = AnswerReader(form)
        self._reasoning: list[str] = []
        self._content: list[str] = []
        self._calls: list[dict[str, Any]] = []
        self._tokens = 0
        self._reasoning_tokens: int | None = None

    def feed(self, chunk: TokenChunk) -> list[dict[str, Any]]:
        """`delta` objects that these tokens complete."""
        if self._form.thinking and self._reasoning_tokens is None:
            end = self._form.thinking_ends
            if end in chunk.token_ids:
                self._reasoning_tokens = self._tokens + chunk.token_ids.index(end) + 1
        self._tokens += len(chunk.token_ids)
        return self._deltas(self._reader.feed(chunk.text))

    def close(self, finish: Finish) -> list[dict[str, Any]]:
        """`delta` objects of what was held back."""
        return self._deltas([*self._reader.feed(finish.text), *self._reader.close()])

    def reason(self, reason: str) -> str:
        """OpenAI's `finish_reason`. An answer that was cut off says so, calls or not."""
        return "tool_calls" if reason == "stop" and self._calls else reason

    def reasoning_tokens(self, finish: Finish) -> int | None:
        """Tokens of the reasoning with the one that ends it; None where that cannot be told."""
        if not self._form.thinking:
            return 0
        if self._reasoning_tokens is None and self._reader.thinking:
            return finish.usage.completion_tokens
        return self._reasoning_tokens

    def message(self) -> dict[str, Any]:
        """Fields of a whole response's `message`, beside its role."""
        content = "".join(self._content)
        message: dict[str, Any] = {"content": content or (None if self._calls else "")}
        if self._form.thinking:
            message["reasoning_content"] = "".join(self._reasoning)
        if self._calls:
            message["tool_calls"] = self._calls
        return message

    def _deltas(self, parts: Sequence[Part]) -> list[dict[str, Any]]:
        deltas: list[dict[str, Any]] = []
        for part in parts:
            if isinstance(part, Reasoning):
                self._reasoning.append(part.text)
                deltas.append({"reasoning_content": part.text})
            elif isinstance(part, Content):
                self._content.append(part.text)
                deltas.append({"content": part.text})
            else:
                deltas += self._call(part)
        return deltas

    def _call(self, call: Call) -> list[dict[str, Any]]:
        """Name first, then the arguments: the order in which clients put a call together."""
        head: dict[str, Any] = {"id": f"call_{secrets.token_hex(12)}", "type": "function"}
        self._calls.append({**head, "function": {"name": call.name, "arguments": call.arguments}})
        named = {"index": call.index, **head, "function": {"name": call.name, "arguments": ""}}
        filled = {"index": call.index, "function": {"arguments": call.arguments}}
        return [{"tool_calls": [named]}, {"tool_calls": [filled]}]
