"""Log probabilities of an answer's tokens in OpenAI's two shapes.

A token's entry goes out with the text that it completes, so the entries of a response are those of
its text: what a stop string cut off has none, and neither has the end token.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from penstock.request import TokenChunk, TokenLogprobs
from penstock.tokenizer import Tokenizer


@dataclass(frozen=True)
class Entry:
    """One token: its place in the answer's characters and what is told of it."""

    token: int
    start: int
    end: int
    told: TokenLogprobs


class Logprobs:
    """Of one choice. `feed` every chunk, then `close` once; both give the entries now due."""

    def __init__(self, tokenizer: Tokenizer | None, *, ends: frozenset[int]) -> None:
        """`ends`: tokens that end an answer and have no entry; empty if they are to be text."""
        self._tokenizer = tokenizer
        self._ends = ends
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._written = self._shown = 0
        self._waiting: list[Entry] = []
        self.entries: list[Entry] = []

    def feed(self, chunk: TokenChunk) -> list[Entry]:
        for token, told in zip(chunk.token_ids, chunk.logprobs, strict=True):
            if token in self._ends:
                continue
            start = self._written
            self._written += len(self._utf8.decode(self._bytes(token)))
            self._waiting.append(Entry(token, start, self._written, told))
        self._shown += len(chunk.text)
        return self._due(final=False)

    def close(self, text: str) -> list[Entry]:
        """`text` is what was held back until the end."""
        self._shown += len(text)
        return self._due(final=True)

    def _due(self, *, final: bool) -> list[Entry]:
        """A token is due when all its text is shown; at the end, when any of it is."""
        count = 0
        for entry in self._waiting:
            if entry.end > self._shown and not (final and entry.start < self._shown):
                break
            count += 1
        due, self._waiting = self._waiting[:count], self._waiting[count:]
        self.entries += due
        return due

    def chat(self, entries: Sequence[Entry]) -> dict[str, Any]:
        """`choices[].logprobs` of a chat response."""
        return {
            "content": [
                {
                    **self._named(entry.token, entry.told.logprob),
                    "top_logprobs": [self._named(t, lp) for t, lp in entry.told.top],
                }
                for entry in entries
            ],
            "refusal": None,
        }

    def text(self, entries: Sequence[Entry], *, offset: int, top: int) -> dict[str, Any]:
        """`choices[].logprobs` of a text completion whose answer begins at character `offset`.

        Two tokens may have one spelling (half a character each): the likelier one keeps it.
        """
        tops = []
        for entry in entries:
            likely = {self._spelling(t): lp for t, lp in reversed(entry.told.top)}
            # The drawn token is named also where it is not one of the likeliest.
            likely.setdefault(self._spelling(entry.token), entry.told.logprob)
            tops.append(likely)
        return {
            "tokens": [self._spelling(entry.token) for entry in entries],
            "token_logprobs": [entry.told.logprob for entry in entries],
            "top_logprobs": tops if top else None,
            "text_offset": [offset + entry.start for entry in entries],
        }

    def _named(self, token: int, logprob: float) -> dict[str, Any]:
        raw = self._bytes(token, specials=True)
        text = self._spelling(token)
        return {"token": text, "logprob": logprob, "bytes": list(raw) if self._tokenizer else None}

    def _spelling(self, token: int) -> str:
        if self._tokenizer is None:
            return f"token_id:{token}"
        return self._bytes(token, specials=True).decode("utf-8", errors="replace")

    def _bytes(self, token: int, *, specials: bool = False) -> bytes:
        # Models pad their vocabulary beyond the tokenizer's: such a token has no text.
        if self._tokenizer is None or token >= self._tokenizer.vocab_size:
            return b""
        return self._tokenizer.decode_bytes([token], specials=specials)
