"""Which token rows one pass computes, and how they tile the window (deepseek-v4.md 2.5).

A pass holds rows of several sequences, padded to a multiple of 16. Window attention works on query
tiles of 16 positions aligned to the absolute position, so a token always sits in the same place of
a product of the same shape.

Shape suffixes: R rows (padded), N window tiles, K keys of a tile, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.reference.lanes import ROW_MULTIPLE, round_up
from kernels.reference.rope import cos_sin
from model.cache import SequenceCache

QUERY_TILE = ROW_MULTIPLE


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

    @property
    def tile_start(self) -> int:
        return self.position // QUERY_TILE * QUERY_TILE

    @property
    def tiles(self) -> int:
        return (round_up(self.end, QUERY_TILE) - self.tile_start) // QUERY_TILE


class Rows:
    """The rows of one pass (or, in the last layer, only those whose output is wanted)."""

    def __init__(self, spans: Sequence[Span], *, window: int) -> None:
        self.spans = tuple(spans)
        self.count = sum(span.count for span in spans)
        self.padded = round_up(self.count, ROW_MULTIPLE)
        self.window = window
        self.tile_keys = round_up(window + QUERY_TILE, ROW_MULTIPLE)
        positions = [torch.arange(span.position, span.end) for span in spans]
        padding = torch.zeros(self.padded - self.count, dtype=torch.int64)
        self.positions_R = torch.cat((*positions, padding))
        self._angles: dict[int, tuple[Tensor, Tensor]] = {}
        self._place_tiles()

    def cos_sin(self, freq_P: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [R, P] of the rows' positions; computed once per frequency table."""
        key = id(freq_P)
        if key not in self._angles:
            self._angles[key] = cos_sin(self.positions_R, freq_P)
        return self._angles[key]

    def _place_tiles(self) -> None:
        slots, starts, first = [], [], 0
        for span in self.spans:
            offset = first * QUERY_TILE - span.tile_start
            slots.append(torch.arange(span.position + offset, span.end + offset))
            starts.append(torch.arange(span.tiles) * QUERY_TILE + span.tile_start)
            first += span.tiles
        self.tiles = first
        self.slots_R = torch.cat(slots)
        """Row -> place in the tiles, real rows only."""
        self.in_place = self.count == first * QUERY_TILE
        key = torch.arange(self.tile_keys)
        query = torch.arange(QUERY_TILE)[:, None]
        seen = (key > query) & (key <= query + self.window)
        before = self.window - torch.cat(starts)
        if int(before.max()) > 0:
            seen = seen & (key >= before[:, None, None])
        else:
            seen = seen[None]
        self.hidden_NQK = ~seen

    def window_tiles(self, histories: Sequence[Tensor]) -> Tensor:
        """[N, K, C]: keys of each tile, zeros where no row is known.

        `histories[i]` holds the rows of consecutive positions that end with span i's last token.
        """
        parts = []
        for span, history in zip(self.spans, histories, strict=True):
            rows = (span.tiles - 1) * QUERY_TILE + self.tile_keys
            keys = history.new_zeros((rows, history.shape[1]))
            at = span.end - history.shape[0] - (span.tile_start - self.window)
            known = history[max(-at, 0) :]
            keys[max(at, 0) : max(at, 0) + known.shape[0]] = known
            channels = keys.shape[1]
            parts.append(
                keys.as_strided(
                    (span.tiles, self.tile_keys, channels), (QUERY_TILE * channels, channels, 1)
                )
            )
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def to_tiles(self, x: Tensor) -> Tensor:
        """Real rows [R, ...] -> [N * 16, ...], zeros elsewhere."""
        if self.in_place:
            return x[: self.count]
        out = x.new_zeros((self.tiles * QUERY_TILE, *x.shape[1:]))
        return out.index_copy_(0, self.slots_R, x[: self.count])

    def from_tiles(self, x: Tensor) -> Tensor:
        """[N * 16, ...] -> real rows [count, ...]."""
        return x if self.in_place else x.index_select(0, self.slots_R)

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
        return torch.tensor(index), Rows(spans, window=self.window)
