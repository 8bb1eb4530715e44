"""`Share`: the rows of one pass cut over the planes of a replica (deepseek-v4.md 8, "Context
parallel").

Plane i computes consecutive rows. In every layer it needs what the rows before its own left behind:
the last window rows and the compressors' raw rows, which come from plane i - 1; and every plane
keeps the whole cache, so entries are gathered. Cuts lie on multiples of 128 positions, where every
compressor's window ends, so each plane completes its own entries and knows how many the others
make. Rows only move: no sum is split, and the bits are those of one plane.

Shape suffixes: R rows, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from model.ranks.communicator import Communicator

CUT_TOKENS = 128
Pairs = list[tuple[int, float]]


def cut(start: int, end: int, *, planes: int, unit: int) -> tuple[int, ...] | None:
    """Borders of the planes' parts of positions start .. end - 1, None if they are too few.

    `unit` is a multiple of 128. Inner borders are multiples of it; every part but the first has at
    least `unit` rows.
    """
    count = end - start
    if planes == 1 or count < planes * unit:
        return None
    inner = [(start + count * i // planes) // unit * unit for i in range(1, planes)]
    return (start, *inner, end)


class Share:
    """This plane's part of a pass over one sequence."""

    def __init__(self, comm: Communicator, borders: Sequence[int]) -> None:
        self._comm, self._borders = comm, tuple(borders)
        self.rank = comm.grid.cp_rank
        self.start, self.end = self._borders[self.rank : self.rank + 2]

    @property
    def counts(self) -> tuple[int, ...]:
        """Rows of every plane."""
        return tuple(end - start for start, end in pairwise(self._borders))

    def before_and_after(
        self, start: Tensor, tail: Tensor, counts: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """What precedes this plane's rows, and what the whole pass leaves behind.

        `start` is what precedes the pass; `tail` is what this plane's rows leave, `counts` how many
        rows that is for each plane.
        """
        tails = self._comm.gather_planes(tail, counts)
        # Copies: a view would keep all planes' rows alive.
        return (start if self.rank == 0 else tails[self.rank - 1].clone()), tails[-1].clone()

    def carries(
        self, start: Tensor, raw: Tensor, *, ratio: int, kept: int
    ) -> tuple[Tensor, Tensor]:
        """A compressor's raw rows before this plane's, and the carry after the pass.

        `kept`: rows of the window before that stay in a carry (the overlap of CSA).
        """
        counts = [kept + border % ratio for border in self._borders[1:]]
        known = torch.cat((start, raw)) if self.rank == 0 else raw
        tail = known[known.shape[0] - counts[self.rank] :]
        return self.before_and_after(start, tail, counts)

    def entries(self, mine: Tensor, *, ratio: int) -> tuple[int, Tensor]:
        """Number of the first entry that the pass completes, and all of them."""
        done = [border // ratio for border in self._borders]
        counts = [after - before for before, after in pairwise(done)]
        return done[0], torch.cat(self._comm.gather_planes(mine[: counts[self.rank]], counts))

    def rows(self, mine: Tensor) -> Tensor:
        """Every plane's rows of the pass."""
        return torch.cat(self._comm.gather_planes(mine[: self.end - self.start], self.counts))

    def from_last(self, mine: Tensor, count: int) -> Tensor:
        """The last plane's last `count` of these rows, of which every plane holds at least one."""
        padded = mine.new_zeros((count, *mine.shape[1:]))
        kept = mine[max(mine.shape[0] - count, 0) :]
        padded[count - kept.shape[0] :] = kept
        return self._comm.gather_planes(padded, [count] * self._comm.grid.cp)[-1].clone()

    def evidence_of_last(self, mine: Pairs, *, most: int) -> Pairs:
        """The last plane's evidence: at most `most` pairs of entry and mass."""
        filled = torch.full((most, 2), -1.0, dtype=torch.float64)
        if mine:
            filled[: len(mine)] = torch.tensor(mine, dtype=torch.float64)
        told = self.from_last(filled, most).tolist()
        return [(int(entry), mass) for entry, mass in told if entry >= 0]
