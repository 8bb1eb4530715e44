"""A sequence of the device engine: where its memory lies, and what its last token left behind.

Shape suffixes: R rows (tokens), K selected entries, D model width.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from model.layout import EVIDENCE_PAIRS

Pairs = list[tuple[int, float]]


@dataclass(frozen=True)
class Picked:
    """Selected entries of some rows [R, K] (int32, -1 unused) and their masses [R, K], fp32, still
    on the device: nothing waits for them until somebody asks.
    """

    entries_RK: Tensor
    masses_RK: Tensor

    def pairs(self, row: int) -> Pairs:
        """(entry, mass) of one row, heaviest first, ties to the lower entry."""
        entries, masses = self.entries_RK[row].tolist(), self.masses_RK[row].tolist()
        found = [(e, m) for e, m in zip(entries, masses, strict=True) if e >= 0 and m > 0.0]
        return sorted(found, key=lambda pair: (-pair[1], pair[0]))[:EVIDENCE_PAIRS]


@dataclass(frozen=True)
class Trail:
    """The rows of a seekable forward: hidden rows [R, D] and evidence of `count` tokens."""

    start: int
    count: int
    hidden_RD: Tensor
    picked: Picked | None
    first: int
    """The rows' place in `picked`."""


class DeviceSequence:
    """Fulfils the `Sequence` protocol."""

    def __init__(self, capacity: int, place: int, pages: list[int], *, owner: object) -> None:
        self._capacity = capacity
        self.place, self.pages, self.owner = place, pages, owner
        self.position = 0
        self.loaded_blocks = 0
        self.released = False
        self.hidden_D: Tensor | None = None
        self.trail: Trail | None = None
        self._picked: tuple[Picked, int] | None = None
        self._pairs: Pairs = []

    @property
    def capacity(self) -> int:
        return self._capacity

    def grow(self, capacity: int, pages: list[int]) -> None:
        """Room for `capacity` tokens, with these pages behind its own."""
        self._capacity = capacity
        self.pages = [*self.pages, *pages]

    def tell(self, picked: Picked | None, row: int) -> None:
        """Evidence of the last token: `row` of `picked`."""
        self._picked, self._pairs = None if picked is None else (picked, row), []

    def know(self, pairs: Pairs) -> None:
        """Evidence that came with a state."""
        self._picked, self._pairs = None, pairs

    @property
    def evidence(self) -> Pairs:
        if self._picked is not None:
            self._pairs = self._picked[0].pairs(self._picked[1])
            self._picked = None
        return self._pairs

    def seek(self, position: int) -> None:
        """See `Engine.seek`. Rings and pages keep what they hold: newer rows are never read, and
        written again before they could be.
        """
        trail = self.trail
        if trail is None or not 0 < position - trail.start <= trail.count:
            raise ValueError(f"position {position} is not inside the last seekable forward")
        at = position - trail.start - 1
        self.hidden_D = trail.hidden_RD[at]
        self.tell(trail.picked, trail.first + at)
        self.position = position
