"""One answer's rules: what of a token may be shown, and whether it is the last one. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from decode.detokenize import DecodeBytes, Detokenizer
from decode.stop import StopFilter
from penstock.request import StopRule

STOP, LENGTH = "stop", "length"


@dataclass(frozen=True)
class Piece:
    """What one token adds. `reason` is set with the last one."""

    text: str
    reason: str | None


class Output:
    """Counts tokens from the first one on. Without a tokenizer there is no text and no stop
    string.
    """

    def __init__(
        self, rule: StopRule, eos: frozenset[int], decode_bytes: DecodeBytes | None
    ) -> None:
        self._rule = rule
        self._eos = eos
        self._detokenizer = Detokenizer(decode_bytes) if decode_bytes is not None else None
        self._stop = StopFilter(rule.strings)
        self.count = 0

    @property
    def most_left(self) -> int:
        """Tokens that the answer may still get."""
        return self._rule.max_tokens - self.count

    @property
    def least_left(self) -> int:
        """Tokens that must still come before an end token may."""
        return max(self._rule.min_tokens - self.count, 0)

    @property
    def ends(self) -> frozenset[int]:
        return self._eos

    @property
    def forbidden(self) -> frozenset[int]:
        """Tokens that must not be drawn next."""
        return self.forbidden_after(0)

    def forbidden_after(self, ahead: int) -> frozenset[int]:
        """Tokens that must not be drawn once `ahead` more have been accepted."""
        return self._eos if ahead < self.least_left else frozenset()

    def accept(self, token: int) -> Piece:
        """The next token of the answer. The end token counts but has no text."""
        self.count += 1
        if token in self._eos and not self._rule.ignore_eos:
            return Piece("", STOP)
        text = self._shown(self._detokenizer.feed(token)) if self._detokenizer else ""
        if self._stop.stopped:
            return Piece(text, STOP)
        return Piece(text, LENGTH if self.count >= self._rule.max_tokens else None)

    def replay(self, tokens: Sequence[int]) -> list[Piece]:
        """Accept tokens that another worker drew; what each added. Ends early if the answer did."""
        pieces: list[Piece] = []
        for token in tokens:
            pieces.append(self.accept(token))
            if pieces[-1].reason is not None:
                break
        return pieces

    def close(self) -> str:
        """Text that was held back and is now final."""
        if self._detokenizer is None:
            return ""
        return self._stop.feed(self._detokenizer.flush()) + self._stop.flush()

    def _shown(self, text: str) -> str:
        # A stop string that would end the answer too early is ordinary text.
        if self.count < self._rule.min_tokens:
            return text
        return self._stop.feed(text)
