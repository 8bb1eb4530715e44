"""Which token rows one pass computes: rows of several sequences, padded as its ops want it.

Shape suffixes: R rows (padded), P pairs of a rotation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.ops import ReferenceOps
from kernels.reference.lanes import round_up
from model.cache import SequenceCache
from model.ranks.share import Share


@dataclass(frozen=True)
class Span:
    """`count` consecutive tokens of one sequence, first at `position`, in rows from `row` on."""

    cache: SequenceCache
    row: int
    count: int
    position: int

    @property
    def end(self) -> int:
        return self.position + self.count

    @property
    def rows(self) -> slice:
        return slice(self.row, self.row + self.count)


class Rows:
    """The rows of one pass (or, in the last layer, only those whose output is wanted)."""

    def __init__(
        self,
        spans: Sequence[Span],
        *,
        window: int,
        ops: ReferenceOps,
        share: Share | None = None,
    ) -> None:
        """`share`: the one span is a plane's part of a longer one."""
        self.spans = tuple(spans)
        self.share = share
        self.count = sum(span.count for span in spans)
        self.padded = round_up(self.count, ops.row_multiple)
        self.window = window
        self._ops = ops
        positions = [torch.arange(span.position, span.end) for span in spans]
        padding = torch.zeros(self.padded - self.count, dtype=torch.int64)
        self.positions_R = torch.cat((*positions, padding))
        self._angles: dict[int, tuple[Tensor, Tensor]] = {}

    def cos_sin(self, freq_P: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [R, P] of the rows' positions; computed once per frequency table."""
        key = id(freq_P)
        if key not in self._angles:
            self._angles[key] = self._ops.cos_sin(self.positions_R, freq_P)
        return self._angles[key]

    def last_of_each(self, most: int = 1) -> tuple[Tensor, Rows]:
        """Row numbers of every span's last tokens (at most `most`), and those rows as a pass of
        their own.
        """
        index: list[int] = []
        spans: list[Span] = []
        row = 0
        for span in self.spans:
            # A trail needs every row.
            count = min(span.count, most) if span.cache.trail is None else span.count
            index += range(span.row + span.count - count, span.row + span.count)
            spans.append(Span(span.cache, row, count, span.end - count))
            row += count
        return torch.tensor(index), Rows(spans, window=self.window, ops=self._ops)
