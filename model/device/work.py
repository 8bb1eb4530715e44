"""Segments under way: checked, and cut into passes. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import pairwise

from model.device.sequence import DeviceSequence
from model.engine import SEEKABLE_TOKENS, Segment


@dataclass
class Work:
    """`done` of a segment's tokens are absorbed."""

    sequence: DeviceSequence
    tokens: list[int]
    states_at: tuple[int, ...]
    all_logits: bool
    seekable: bool
    done: int = 0

    @property
    def every(self) -> bool:
        """Predictions are wanted after every token, not only after the last."""
        return self.all_logits or self.seekable

    def take(self, budget: int) -> list[int]:
        """Next tokens: within the budget, and not beyond the next wanted state."""
        position = self.sequence.position
        stop = next((p - position for p in self.states_at if p > position), budget)
        return self.tokens[self.done : self.done + min(budget, stop)]


@dataclass(frozen=True)
class Part:
    """Tokens of one segment in the next pass."""

    work: Work
    tokens: list[int]


def checked(segment: Segment, sequence: DeviceSequence, vocab_size: int) -> Work:
    """Raises ValueError for what no engine may be asked."""
    tokens = list(segment.tokens)
    position, end = sequence.position, sequence.position + len(tokens)
    if end > sequence.capacity:
        raise ValueError(
            f"{len(tokens)} tokens at position {position} exceed the capacity {sequence.capacity}"
        )
    if tokens and not (min(tokens) >= 0 and max(tokens) < vocab_size):
        raise ValueError(f"a token id is outside the vocabulary of {vocab_size}")
    wanted = segment.states_at
    ascending = all(a < b for a, b in pairwise(wanted))
    if wanted and not (ascending and position < wanted[0] and wanted[-1] <= end):
        raise ValueError(f"states_at {wanted} must ascend inside ({position}, {end}]")
    if segment.seekable and (wanted or len(tokens) > SEEKABLE_TOKENS):
        raise ValueError(
            f"a seekable segment has at most {SEEKABLE_TOKENS} tokens and no states_at"
        )
    return Work(sequence, tokens, wanted, segment.all_logits, segment.seekable)


def next_pass(pending: Seq[Work], *, rows: int, context: int) -> list[Part]:
    """A prompt pass: every sequence at most once, up to `rows` tokens and, but for the first, to
    `context` positions of all sequences together, whose entries are decoded into one buffer.
    """
    parts: list[Part] = []
    row = known = 0
    for item in pending:
        # A seekable segment stays whole: its trail is that of one pass.
        if row >= rows or (item.seekable and row + len(item.tokens) > rows):
            break
        known += item.sequence.position + len(item.take(rows - row))
        if parts and known > context:
            break
        tokens = item.take(rows - row)
        parts.append(Part(item, tokens))
        row += len(tokens)
    return parts
