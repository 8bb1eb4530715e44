"""Attention of one pass: window, heavy entries or selected entries, one softmax
(deepseek-v4.md 2.5).

Window attention works on query tiles of 16 positions aligned to the absolute position, so a token
always sits in the same place of a product of the same shape.

Shape suffixes: R rows (padded), H heads, C channels, N tiles, Q query rows, K slots or keys,
E entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.reference.attention import Part, dense_part, entry_mass, merge_parts, tile_part
from kernels.reference.lanes import ROW_MULTIPLE, pad_rows, round_up

QUERY_TILE = ROW_MULTIPLE
ENTRY_TILE = 128
_MOST_FLOATS = 1 << 21
_NO_KEY = -1e30


@dataclass(frozen=True)
class AttendSpan:
    """`count` consecutive tokens of one sequence in rows from `row` on, first at `position`."""

    row: int
    count: int
    position: int
    history_NC: Tensor
    """Window rows of consecutive positions that end with the span's last token."""
    entries_EC: Tensor
    """Compressed entries, with room for whole tiles of 128."""


class Tiles:
    """How the rows of a pass lie in window tiles; `places` are (row, count, position)."""

    def __init__(self, places: tuple[tuple[int, int, int], ...], *, window: int) -> None:
        self.key = (places, window)
        self.window = window
        self.keys = round_up(window + QUERY_TILE, ROW_MULTIPLE)
        self.counts: list[tuple[int, int]] = []
        """First position and number of tiles of each span."""
        slots, starts, first = [], [], 0
        for _, count, position in places:
            start = position // QUERY_TILE * QUERY_TILE
            tiles = (round_up(position + count, QUERY_TILE) - start) // QUERY_TILE
            offset = first * QUERY_TILE - start
            slots.append(torch.arange(position + offset, position + count + offset))
            starts.append(torch.arange(tiles) * QUERY_TILE + start)
            self.counts.append((start, tiles))
            first += tiles
        self.tiles = first
        self.slots_R = torch.cat(slots)
        """Row -> place in the tiles, real rows only."""
        self.rows = self.slots_R.shape[0]
        self.in_place = self.rows == first * QUERY_TILE
        key = torch.arange(self.keys)
        query = torch.arange(QUERY_TILE)[:, None]
        seen = (key > query) & (key <= query + window)
        before = window - torch.cat(starts)
        if int(before.max()) > 0:
            seen = seen & (key >= before[:, None, None])
        else:
            seen = seen[None]
        self.hidden_NQK = ~seen

    def window_tiles(self, spans: Sequence[AttendSpan]) -> Tensor:
        """[N, K, C]: keys of each tile, zeros where no row is known."""
        parts = []
        for span, (start, tiles) in zip(spans, self.counts, strict=True):
            history = span.history_NC
            rows = (tiles - 1) * QUERY_TILE + self.keys
            keys = history.new_zeros((rows, history.shape[1]))
            at = span.position + span.count - history.shape[0] - (start - self.window)
            known = history[max(-at, 0) :]
            keys[max(at, 0) : max(at, 0) + known.shape[0]] = known
            channels = keys.shape[1]
            parts.append(
                keys.as_strided((tiles, self.keys, channels), (QUERY_TILE * channels, channels, 1))
            )
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def to_tiles(self, x: Tensor) -> Tensor:
        """Real rows [R, ...] -> [N * 16, ...], zeros elsewhere."""
        if self.in_place:
            return x[: self.rows]
        out = x.new_zeros((self.tiles * QUERY_TILE, *x.shape[1:]))
        return out.index_copy_(0, self.slots_R, x[: self.rows])

    def from_tiles(self, x: Tensor) -> Tensor:
        """[N * 16, ...] -> real rows [count, ...]."""
        return x if self.in_place else x.index_select(0, self.slots_R)


def attend(
    q_RHC: Tensor,
    spans: Sequence[AttendSpan],
    sink_H: Tensor,
    tiles: Tiles,
    *,
    ratio: int,
    picked_RK: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output [R, H, C] of each row's softmax, its maximum and its denominator [R, H].

    `ratio` 0: the window only. `picked_RK` None: also all complete entries; else the selected ones
    of each real row, ascending, -1 in unused slots.
    """
    parts = [_window_part(q_RHC, spans, tiles, scale)]
    if picked_RK is not None:
        parts.append(_selected_part(q_RHC, spans, picked_RK, scale))
    elif ratio:
        parts.append(_heavy_part(q_RHC, spans, ratio, scale))
    return merge_parts(parts, sink_H)


def _window_part(q_RHC: Tensor, spans: Sequence[AttendSpan], tiles: Tiles, scale: float) -> Part:
    """Tiles of 16 positions against the rows that any of them may see."""
    _, heads, dim = q_RHC.shape
    q = tiles.to_tiles(q_RHC).reshape(tiles.tiles, QUERY_TILE * heads, dim)
    keys = tiles.window_tiles(spans)
    hidden = tiles.hidden_NQK.repeat_interleave(heads, 1)
    floats = QUERY_TILE * heads * (tiles.keys + 2 * dim)
    step = max(_MOST_FLOATS // floats, 1)
    found = []
    for at in range(0, tiles.tiles, step):
        mask = hidden if hidden.shape[0] == 1 else hidden[at : at + step]
        tile = slice(at, at + step)
        found.append(tile_part(q[tile], keys[tile], mask, scale=scale))
    part = found[0] if len(found) == 1 else _join(found)
    flat = (tiles.tiles * QUERY_TILE, heads)
    missing = q_RHC.shape[0] - tiles.rows
    return Part(
        _padded(tiles.from_tiles(part.top.view(flat)), missing),
        _padded(tiles.from_tiles(part.norm.view(flat)), missing),
        _padded(tiles.from_tiles(part.out.view(*flat, dim)), missing),
    )


def _padded(x: Tensor, rows: int) -> Tensor:
    return torch.cat((x, x.new_zeros((rows, *x.shape[1:])))) if rows else x


def _empty_part(q_RHC: Tensor) -> Part:
    top = torch.full(q_RHC.shape[:2], _NO_KEY)
    return Part(top, torch.zeros_like(top), torch.zeros(q_RHC.shape))


def _heavy_part(q_RHC: Tensor, spans: Sequence[AttendSpan], ratio: int, scale: float) -> Part:
    """HCA: every complete entry, in tiles of 128 entries."""
    whole = _empty_part(q_RHC)
    _, heads, dim = q_RHC.shape
    for span in spans:
        row, end = span.row, span.row + span.count
        visible = (torch.arange(span.position, span.position + span.count) + 1) // ratio
        while row < end:
            keys = round_up(max(int(visible[-1]), 1), ENTRY_TILE)
            floats = heads * (keys + keys // ENTRY_TILE * dim)
            tile = slice(row, min(row + max(_MOST_FLOATS // floats, ROW_MULTIPLE), end))
            seen = visible[row - span.row : tile.stop - span.row]
            row = tile.stop
            if not int(seen[-1]):
                continue
            keys = round_up(int(seen[-1]), ENTRY_TILE)
            count = seen.shape[0] * heads
            part = dense_part(
                pad_rows(q_RHC[tile].reshape(count, dim)),
                span.entries_EC[:keys].view(-1, ENTRY_TILE, dim),
                pad_rows(seen.repeat_interleave(heads)),
                scale=scale,
            )
            whole.top[tile] = part.top[:count].view(-1, heads)
            whole.norm[tile] = part.norm[:count].view(-1, heads)
            whole.out[tile] = part.out[:count].view(-1, heads, dim)
    return whole


def _selected_part(
    q_RHC: Tensor, spans: Sequence[AttendSpan], picked_RK: Tensor, scale: float
) -> Part:
    """CSA: the indexer's entries, gathered ascending into a fixed number of slots."""
    whole = _empty_part(q_RHC)
    _, heads, dim = q_RHC.shape
    step = max(_MOST_FLOATS // (round_up(picked_RK.shape[1], ROW_MULTIPLE) * dim), 1)
    for span in spans:
        for row in range(span.row, span.row + span.count, step):
            tile = slice(row, min(row + step, span.row + span.count))
            if int(picked_RK[tile.stop - 1, 0]) < 0:
                continue
            keys, hidden = _gather(span.entries_EC, picked_RK[tile])
            q = _pad_heads(q_RHC[tile])
            part = tile_part(q, keys, hidden[:, None, :], scale=scale)
            whole.top[tile] = part.top[:, :heads]
            whole.norm[tile] = part.norm[:, :heads]
            whole.out[tile] = part.out[:, :heads]
    return whole


def entry_masses(
    q_HC: Tensor,
    entries_EC: Tensor,
    picked_K: Tensor,
    top_H: Tensor,
    norm_H: Tensor,
    *,
    scale: float,
) -> Tensor:
    """[K]: attention probability of one row's selected entries, averaged over the heads."""
    keys, hidden = _gather(entries_EC, picked_K[None])
    heads = q_HC.shape[0]
    pad = (0, round_up(heads, ROW_MULTIPLE) - heads)
    mass = entry_mass(
        _pad_heads(q_HC[None]),
        keys,
        hidden,
        F.pad(top_H[None], pad),
        F.pad(norm_H[None], pad, value=1.0),
        scale=scale,
        heads=heads,
    )
    return mass[0, : picked_K.shape[0]]


def _pad_heads(q_RHC: Tensor) -> Tensor:
    missing = round_up(q_RHC.shape[1], ROW_MULTIPLE) - q_RHC.shape[1]
    return F.pad(q_RHC, (0, 0, 0, missing)) if missing else q_RHC


def _gather(entries_EC: Tensor, picked_RK: Tensor) -> tuple[Tensor, Tensor]:
    """Keys [R, K, C], K a multiple of 16, and which slots are unused."""
    slots = round_up(picked_RK.shape[1], ROW_MULTIPLE)
    padded = F.pad(picked_RK, (0, slots - picked_RK.shape[1]), value=-1)
    keys = entries_EC.index_select(0, padded.clamp_min(0).view(-1))
    return keys.view(-1, slots, entries_EC.shape[1]), padded < 0


def _join(parts: list[Part]) -> Part:
    return Part(
        torch.cat([p.top for p in parts]),
        torch.cat([p.norm for p in parts]),
        torch.cat([p.out for p in parts]),
    )
