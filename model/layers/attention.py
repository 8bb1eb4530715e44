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
from kernels.reference.attend import AttendSpan
from kernels.reference.attention import Part
from kernels.reference.lanes import ROW_MULTIPLE, round_up
from model.cache import LayerCache
from model.codec import RowCodec
from model.layers.compressor import Compressor
from model.layers.indexer import Indexer
from model.layout import EVIDENCE_PAIRS
from model.linear import Linear, side_by_side
from model.ranks.communicator import Communicator
from model.rows import Rows, Span


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
        sharers: int,
        head_dim: int,
        norm_eps: float,
        compressor: Compressor | None,
        indexer: Indexer | None,
        comm: Communicator,
    ) -> None:
        """`heads` and the weights of heads and output groups are this rank's; `sharers` ranks share
        a group, each with some of its outputs.
        """
        self._comm, self._sharers = comm, sharers
        self._ops, self._codec, self._w = ops, codec, weights
        self._ratio, self._heads, self._dim = ratio, heads, head_dim
        self._eps = norm_eps
        self._scale = float(head_dim) ** -0.5
        self._compressor, self._indexer = compressor, indexer

    def absorb(self, rows: Rows, caches: Sequence[LayerCache], x_RD: Tensor) -> list[Tensor]:
        """Write window rows, entries and carries; returns each span's known window rows."""
        kv = self.window_rows(rows, x_RD)
        spans = zip(rows.spans, caches, strict=True)
        histories = [cache.push(kv[span.rows], rows.share) for span, cache in spans]
        if self._compressor is not None:
            entries, carries = self._compressor.absorb(rows, x_RD, [c.carry for c in caches])
            values = entries.values_NC
            if values.shape[0]:
                values = self._codec.round_kv(values)
            attached = [c.attached for c in caches]
            entries.store(values, [c.entries_EC for c in caches], rows.share, attached=attached)
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
        cos_sin = rows.cos_sin(w.freq_P)
        kv = ops.norm_rotate(w.wkv(x_RD), w.kv_norm_C, *cos_sin, eps=self._eps)
        return self._codec.round_kv(kv)

    def _queries(self, rows: Rows, x_RD: Tensor) -> tuple[Tensor, Tensor]:
        """Low-rank queries [R, Q], and rotated ones [R, H, C]."""
        ops, w = self._ops, self._w
        qr = ops.rms_norm(w.wq_a(x_RD), w.q_norm_Q, eps=self._eps)
        q = w.wq_b(qr).view(rows.padded, self._heads, self._dim)
        return qr, ops.norm_rotate(q, None, *rows.cos_sin(w.freq_P), eps=self._eps)

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
        picked: Tensor | None = None
        if self._indexer is not None:
            picked = self._indexer.select(rows, caches, x_RD, qr, cos_sin)
        spans = [
            AttendSpan(span.row, span.count, span.position, history, cache.entries_EC)
            for span, history, cache in zip(rows.spans, histories, caches, strict=True)
        ]
        out, top, norm = ops.attend(
            q,
            spans,
            w.sink_H,
            window=rows.window,
            ratio=self._ratio,
            picked_RK=picked,
            scale=self._scale,
        )
        y = self._project_out(ops.rotate(out, *cos_sin, inverse=True))
        if picked is None or evidence_rows is None:
            return Attended(y)
        entries = [caches[_owner(rows.spans, row)].entries_EC for row in evidence_rows]
        wanted = (_rows(x, evidence_rows) for x in (q, picked, top, norm))
        q_RHC, picked_RK, top_RH, norm_RH = wanted
        return Attended(y, self._evidence(q_RHC, entries, picked_RK, top_RH, norm_RH))

    def _evidence(
        self,
        q_RHC: Tensor,
        entries: list[Tensor],
        picked_RK: Tensor,
        top_RH: Tensor,
        norm_RH: Tensor,
    ) -> list[list[tuple[int, float]]]:
        """Heaviest entries of each row: (entry, mass averaged over all heads), ties to the lower
        entry.
        """
        q, top, norm = self._comm.join_plane(q_RHC.flatten(1), top_RH, norm_RH)
        q = q.view(q.shape[0], -1, self._dim)
        chosen = picked_RK.tolist()
        found = []
        for row, known in enumerate(entries):
            mass = self._ops.entry_masses(
                q[row], known, picked_RK[row], top[row], norm[row], scale=self._scale
            )
            listed = zip(chosen[row], mass.tolist(), strict=True)
            pairs = [(e, m) for e, m in listed if e >= 0 and m > 0.0]
            found.append(sorted(pairs, key=lambda pair: (-pair[1], pair[0]))[:EVIDENCE_PAIRS])
        return found

    def _project_out(self, out_RHC: Tensor) -> Tensor:
        """Grouped output projection (2.1): one matrix per group of heads, then `wo_b`."""
        w, comm = self._w, self._comm
        heads = out_RHC.flatten(1)
        if self._sharers > 1:
            # Outputs of a group are cut, so each of its ranks needs all heads of the group.
            group = comm.grid.plane_rank // self._sharers
            (heads,) = comm.join_plane(heads)
            heads = heads.view(heads.shape[0], -1, self._sharers * self._heads * self._dim)[
                :, group
            ]
        parts = heads.reshape(heads.shape[0], len(w.wo_a), -1).unbind(1)
        (low,) = comm.join_plane(side_by_side(w.wo_a, parts))
        (y,) = comm.join_plane(w.wo_b(low))
        return y


def _rows(x: Tensor, rows: Sequence[int]) -> Tensor:
    """A view where that will do: a decode step has one row, and the others come in runs."""
    first, count = rows[0], len(rows)
    if rows[-1] - first + 1 == count:
        return x.narrow(0, first, count)
    return x[list(rows)]


def _owner(spans: Sequence[Span], row: int) -> int:
    return next(i for i, span in enumerate(spans) if span.row <= row < span.row + span.count)
