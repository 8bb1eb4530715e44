"""Attention of one layer: window, heavy entries or selected entries, one softmax
(deepseek-v4.md 2).

Two steps: `absorb` writes what these rows add to the caches; `attend` answers for some rows. In the
last layer only the rows whose prediction is wanted need the second step.

Shape suffixes: R rows (padded), H heads, C head channels, D model width, Q query rank, K slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.ops import ReferenceOps
from kernels.reference.attention import Part
from kernels.reference.lanes import ROW_MULTIPLE, round_up
from model.cache import ENTRY_TILE, LayerCache
from model.codec import RowCodec
from model.layers.compressor import Compressor
from model.layers.indexer import Indexer
from model.layout import EVIDENCE_PAIRS
from model.linear import Linear
from model.rows import QUERY_TILE, Rows, Span

_MOST_FLOATS = 1 << 21
_NO_KEY = -1e30


@dataclass(frozen=True)
class AttentionWeights:
    """Projections of one layer; `wo_a` is one matrix per output group (T24)."""

    wq_a: Linear
    q_norm_Q: Tensor
    wq_b: Linear
    wkv: Linear
    kv_norm_C: Tensor
    wo_a: tuple[Linear, ...]
    wo_b: Linear
    sink_H: Tensor
    freq_P: Tensor


@dataclass(frozen=True)
class Attended:
    """Output of the sublayer and, where asked for, each row's heaviest entries."""

    y_RD: Tensor
    evidence: list[list[tuple[int, float]]] | None = None


class Attention:
    def __init__(
        self,
        ops: ReferenceOps,
        codec: RowCodec,
        weights: AttentionWeights,
        *,
        ratio: int,
        heads: int,
        head_dim: int,
        topk: int,
        norm_eps: float,
        compressor: Compressor | None,
        indexer: Indexer | None,
    ) -> None:
        self._ops, self._codec, self._w = ops, codec, weights
        self._ratio, self._heads, self._dim = ratio, heads, head_dim
        self._slots = round_up(topk, ROW_MULTIPLE)
        self._eps = norm_eps
        self._scale = float(head_dim) ** -0.5
        self._compressor, self._indexer = compressor, indexer

    def absorb(self, rows: Rows, caches: Sequence[LayerCache], x_RD: Tensor) -> list[Tensor]:
        """Write window rows, entries and carries; returns each span's known window rows."""
        kv = self.window_rows(rows, x_RD)
        spans = zip(rows.spans, caches, strict=True)
        histories = [cache.push(kv[span.rows]) for span, cache in spans]
        if self._compressor is not None:
            entries, carries = self._compressor.absorb(rows, x_RD, [c.carry for c in caches])
            values = entries.values_NC
            if values.shape[0]:
                values = self._codec.round_kv(values)
            entries.store(values, [c.entries_EC for c in caches])
            for cache, carry, raw in zip(caches, carries, entries.known, strict=True):
                cache.carry = carry
                if cache.trail is not None:
                    cache.trail.carry = raw
        if self._indexer is not None:
            self._indexer.absorb(rows, caches, x_RD)
        return histories

    def window_rows(self, rows: Rows, x_RD: Tensor) -> Tensor:
        """[R, C]: key and value of each row, as the window keeps it."""
        ops, w = self._ops, self._w
        kv = ops.rms_norm(w.wkv(x_RD), w.kv_norm_C, eps=self._eps)
        return self._codec.round_kv(ops.rotate(kv, *rows.cos_sin(w.freq_P)))

    def _queries(self, rows: Rows, x_RD: Tensor) -> tuple[Tensor, Tensor]:
        """Low-rank queries [R, Q], and rotated ones [R, H, C]."""
        ops, w = self._ops, self._w
        qr = ops.rms_norm(w.wq_a(x_RD), w.q_norm_Q, eps=self._eps)
        q = w.wq_b(qr).view(rows.padded, self._heads, self._dim)
        return qr, ops.rotate(ops.rms_norm(q, None, eps=self._eps), *rows.cos_sin(w.freq_P))

    def attend_around(self, rows: Rows, caches: Sequence[LayerCache], x_RD: Tensor) -> Tensor:
        """DSpark (1.7): every row sees the whole window before its span, and all rows of its span.

        All spans must have the same length. Changes no cache. Returns [R, D].
        """
        ops, spans = self._ops, rows.spans
        own, window = spans[0].count, rows.window
        _, q = self._queries(rows, x_RD)
        kv = self.window_rows(rows, x_RD)
        keys = torch.stack(
            [torch.cat((c.window_WC, kv[s.rows])) for s, c in zip(spans, caches, strict=True)]
        )
        lacking = round_up(window + own, ROW_MULTIPLE) - window - own
        keys = torch.nn.functional.pad(keys, (0, 0, 0, lacking))
        known = torch.tensor([max(window - span.position, 0) for span in spans])
        place = torch.arange(keys.shape[1])
        hidden = (place < known[:, None]) | (place >= window + own)
        flat = q[: rows.count].reshape(len(spans), own * self._heads, self._dim)
        more = round_up(flat.shape[1], ROW_MULTIPLE) - flat.shape[1]
        flat = torch.nn.functional.pad(flat, (0, 0, 0, more))
        part = ops.tile_part(flat, keys, hidden[:, None], scale=self._scale)
        shape, queries = (rows.count, self._heads), own * self._heads
        part = Part(
            part.top[:, :queries].reshape(shape),
            part.norm[:, :queries].reshape(shape),
            part.out[:, :queries].reshape(*shape, self._dim),
        )
        out, _, _ = ops.merge_parts([part], self._w.sink_H)
        out = ops.pad_rows(out)
        return self._project_out(ops.rotate(out, *rows.cos_sin(self._w.freq_P), inverse=True))

    def attend(
        self,
        rows: Rows,
        caches: Sequence[LayerCache],
        x_RD: Tensor,
        histories: Sequence[Tensor],
        *,
        evidence_rows: Sequence[int] | None = None,
    ) -> Attended:
        ops, w = self._ops, self._w
        cos_sin = rows.cos_sin(w.freq_P)
        qr, q = self._queries(rows, x_RD)
        parts = [self._window_part(rows, q, histories)]
        picked: Tensor | None = None
        if self._indexer is not None:
            picked = self._indexer.select(rows, caches, x_RD, qr, cos_sin)
            parts.append(self._selected_part(rows, caches, q, picked))
        elif self._compressor is not None:
            parts.append(self._heavy_part(rows, caches, q))
        out, top, norm = ops.merge_parts(parts, w.sink_H)
        y = self._project_out(ops.rotate(out, *cos_sin, inverse=True))
        if picked is None or evidence_rows is None:
            return Attended(y)
        index = torch.tensor(evidence_rows)
        owner = [_owner(rows.spans, row) for row in evidence_rows]
        found = self._evidence(
            [caches[i] for i in owner], q[index], picked[index], top[index], norm[index]
        )
        return Attended(y, found)

    def _window_part(self, rows: Rows, q_RHC: Tensor, histories: Sequence[Tensor]) -> Part:
        """Tiles of 16 positions against the rows that any of them may see."""
        q = rows.to_tiles(q_RHC).reshape(rows.tiles, QUERY_TILE * self._heads, self._dim)
        keys = rows.window_tiles(histories)
        hidden = rows.hidden_NQK.repeat_interleave(self._heads, 1)
        floats = QUERY_TILE * self._heads * (rows.tile_keys + 2 * self._dim)
        step = max(_MOST_FLOATS // floats, 1)
        found = []
        for at in range(0, rows.tiles, step):
            mask = hidden if hidden.shape[0] == 1 else hidden[at : at + step]
            tile = slice(at, at + step)
            found.append(self._ops.tile_part(q[tile], keys[tile], mask, scale=self._scale))
        part = found[0] if len(found) == 1 else _join(found)
        flat = (rows.tiles * QUERY_TILE, self._heads)
        return Part(
            self._ops.pad_rows(rows.from_tiles(part.top.view(flat))),
            self._ops.pad_rows(rows.from_tiles(part.norm.view(flat))),
            self._ops.pad_rows(rows.from_tiles(part.out.view(*flat, self._dim))),
        )

    def _empty_part(self, rows: Rows) -> Part:
        top = torch.full((rows.padded, self._heads), _NO_KEY)
        return Part(top, torch.zeros_like(top), torch.zeros((rows.padded, self._heads, self._dim)))

    def _heavy_part(self, rows: Rows, caches: Sequence[LayerCache], q_RHC: Tensor) -> Part:
        """HCA: every complete entry, in tiles of 128 entries."""
        whole = self._empty_part(rows)
        visible = (rows.positions_R[: rows.count] + 1) // self._ratio
        for span, cache in zip(rows.spans, caches, strict=True):
            row, end = span.row, span.row + span.count
            while row < end:
                keys = round_up(max(int(visible[end - 1]), 1), ENTRY_TILE)
                floats = self._heads * (keys + keys // ENTRY_TILE * self._dim)
                tile = slice(row, min(row + max(_MOST_FLOATS // floats, ROW_MULTIPLE), end))
                seen = visible[tile]
                row = tile.stop
                if not int(seen[-1]):
                    continue
                keys = round_up(int(seen[-1]), ENTRY_TILE)
                count = seen.shape[0] * self._heads
                part = self._ops.dense_part(
                    self._ops.pad_rows(q_RHC[tile].reshape(count, self._dim)),
                    cache.entries_EC[:keys].view(-1, ENTRY_TILE, self._dim),
                    self._ops.pad_rows(seen.repeat_interleave(self._heads)),
                    scale=self._scale,
                )
                whole.top[tile] = part.top[:count].view(-1, self._heads)
                whole.norm[tile] = part.norm[:count].view(-1, self._heads)
                whole.out[tile] = part.out[:count].view(-1, self._heads, self._dim)
        return whole

    def _selected_part(
        self, rows: Rows, caches: Sequence[LayerCache], q_RHC: Tensor, picked_RK: Tensor
    ) -> Part:
        """CSA: the indexer's entries, gathered ascending into a fixed number of slots."""
        whole = self._empty_part(rows)
        step = max(_MOST_FLOATS // (self._slots * self._dim), 1)
        for span, cache in zip(rows.spans, caches, strict=True):
            for row in range(span.row, span.row + span.count, step):
                tile = slice(row, min(row + step, span.row + span.count))
                if int(picked_RK[tile.stop - 1, 0]) < 0:
                    continue
                keys, hidden = self._gather([cache], picked_RK[tile])
                q = self._pad_heads(q_RHC[tile])
                part = self._ops.tile_part(q, keys, hidden[:, None, :], scale=self._scale)
                whole.top[tile] = part.top[:, : self._heads]
                whole.norm[tile] = part.norm[:, : self._heads]
                whole.out[tile] = part.out[:, : self._heads]
        return whole

    def _pad_heads(self, q_RHC: Tensor) -> Tensor:
        missing = round_up(self._heads, ROW_MULTIPLE) - self._heads
        return torch.nn.functional.pad(q_RHC, (0, 0, 0, missing)) if missing else q_RHC

    def _gather(self, caches: Sequence[LayerCache], picked_RK: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [R, K, C] and which slots are unused; one cache for all rows, or one per row."""
        missing = self._slots - picked_RK.shape[1]
        padded = torch.nn.functional.pad(picked_RK, (0, missing), value=-1)
        index = padded.clamp_min(0)
        if len(caches) == 1:
            keys = caches[0].entries_EC.index_select(0, index.view(-1))
        else:
            keys = torch.cat([c.entries_EC[row] for c, row in zip(caches, index, strict=True)])
        return keys.view(-1, self._slots, self._dim), padded < 0

    def _evidence(
        self,
        caches: Sequence[LayerCache],
        q_RHC: Tensor,
        picked_RK: Tensor,
        top_RH: Tensor,
        norm_RH: Tensor,
    ) -> list[list[tuple[int, float]]]:
        """Heaviest entries of each row: (entry, mass averaged over heads), ties to the lower
        entry.
        """
        keys, hidden = self._gather(caches, picked_RK)
        heads = round_up(self._heads, ROW_MULTIPLE)
        pad = (0, heads - self._heads)
        mass = self._ops.entry_mass(
            self._pad_heads(q_RHC),
            keys,
            hidden,
            torch.nn.functional.pad(top_RH, pad),
            torch.nn.functional.pad(norm_RH, pad, value=1.0),
            scale=self._scale,
            heads=self._heads,
        )
        found = []
        for row, weights in zip(picked_RK.tolist(), mass.tolist(), strict=True):
            pairs = [(e, m) for e, m in zip(row, weights, strict=False) if e >= 0 and m > 0.0]
            found.append(sorted(pairs, key=lambda pair: (-pair[1], pair[0]))[:EVIDENCE_PAIRS])
        return found

    def _project_out(self, out_RHC: Tensor) -> Tensor:
        """Grouped output projection (2.1): one matrix per group of heads, then `wo_b`."""
        groups = len(self._w.wo_a)
        parts = out_RHC.reshape(out_RHC.shape[0], groups, -1).unbind(1)
        low = [wo(part.contiguous()) for wo, part in zip(self._w.wo_a, parts, strict=True)]
        return self._w.wo_b(torch.cat(low, 1))


def _owner(spans: Sequence[Span], row: int) -> int:
    return next(i for i, span in enumerate(spans) if span.row <= row < span.row + span.count)


def _join(parts: list[Part]) -> Part:
    return Part(
        torch.cat([p.top for p in parts]),
        torch.cat([p.norm for p in parts]),
        torch.cat([p.out for p in parts]),
    )
