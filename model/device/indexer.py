"""Lightning indexer on paged FP4 keys: which entries each token attends to (deepseek-v4.md 2.4).

Shape suffixes: R rows (tokens), H index heads, C channels, D model width, Q query rank, K selected
slots, P rotated pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.device import ReferenceDeviceOps
from kernels.reference.pages import IndexPages
from model.config import CSA_RATIO
from model.device.pools import Geometry, LayerPool
from model.device.rows import Rows, Span
from model.device.weights import Product

_MOST_SCORES = 1 << 26
"""Scores held at once: 256 MiB, whatever the context."""
_GATHER_FROM = 16
"""Tokens of one sequence for which its keys are worth decoding once."""


@dataclass(frozen=True)
class IndexerWeights:
    wq_b: Product
    weights_proj: Product
    project: Product
    ape_SA: Tensor
    norm_C: Tensor
    signs_CC: Tensor
    freq_P: Tensor


class Indexer:
    def __init__(
        self,
        ops: ReferenceDeviceOps,
        geometry: Geometry,
        weights: IndexerWeights,
        *,
        dtype: torch.dtype,
        round_scores: bool,
    ) -> None:
        """`round_scores`: to bf16 before the top-k (5.3)."""
        c = geometry.config
        self._ops, self._geometry, self._w = ops, geometry, weights
        self._heads, self._dim, self._topk = c.index_heads, c.index_dim, c.index_topk
        self._scale = float(c.index_dim) ** -0.5 * float(c.index_heads) ** -0.5
        self._eps, self._dtype, self._round_scores = c.norm_eps, dtype, round_scores

    def __call__(
        self,
        rows: Rows,
        pool: LayerPool,
        x_RD: Tensor,
        qr_RQ: Tensor,
        cos_RP: Tensor,
        sin_RP: Tensor,
    ) -> Tensor:
        """int32 [R, K]: selected entries, ascending, -1 in unused slots. Adds the keys of windows
        that end in the pass first.
        """
        self._absorb(rows, pool, x_RD)
        most = rows.most_visible(CSA_RATIO)
        if most <= self._topk:
            # All are selected: nothing to score. A number that only the host knows, but of a
            # captured step it belongs to the bucket.
            return rows.once("visible entries", lambda: _visible_entries(rows, most))
        ops, w = self._ops, self._w
        q = w.wq_b(ops, qr_RQ, self._dtype).view(rows.count, self._heads, self._dim)
        q = ops.rope(q, cos_RP, sin_RP, dtype=torch.float32)
        codes, scale = ops.round_index(q.view(-1, self._dim), w.signs_CC)
        weight = w.weights_proj(ops, x_RD, torch.float32) * self._scale
        weight = weight * scale.view(rows.count, self._heads)
        return self._select(rows, pool, codes.view(q.shape), weight)

    def _absorb(self, rows: Rows, pool: LayerPool, x_RD: Tensor) -> None:
        w = self._w
        assert pool.index_PB is not None and pool.index_carry_NSX is not None
        raw = w.project(self._ops, x_RD, torch.float32)
        windows = rows.windows(CSA_RATIO)
        if windows is not None:
            self._ops.compress_index(
                raw, pool.index_carry_NSX, windows.windows_B4, w.ape_SA, w.norm_C,
                *rows.window_angles(windows, w.freq_P), w.signs_CC, windows.slots_B,
                pool.index_PB, self._geometry.index(), eps=self._eps,
            )  # fmt: skip
        self._ops.keep_carry(raw, pool.index_carry_NSX, rows.spans_N4, w.ape_SA)

    def _select(self, rows: Rows, pool: LayerPool, q: Tensor, weight: Tensor) -> Tensor:
        pages_PB = pool.index_PB
        assert pages_PB is not None
        visible = rows.visible(CSA_RATIO)
        parts: list[Tensor] = []
        few: list[Span] = []

        def flush() -> None:
            if few:
                part = slice(few[0].row, few[-1].row + few[-1].count)
                parts.append(self._paged(rows, pages_PB, part, q, weight, visible))
                few.clear()

        for span in rows.spans:
            if span.count < _GATHER_FROM:
                few.append(span)
                continue
            flush()
            parts.append(self._gathered(rows, pages_PB, span, q, weight, visible))
        flush()
        if rows.is_step:
            every = slice(0, rows.count)
            parts.append(self._paged(rows, pages_PB, every, q, weight, visible))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _gathered(
        self,
        rows: Rows,
        pages_PB: Tensor,
        span: Span,
        q: Tensor,
        weight: Tensor,
        visible: Tensor,
    ) -> Tensor:
        """One sequence's keys decoded once for all its tokens, which are scored in tiles."""
        owner = rows.spans.index(span)
        entry = torch.arange(span.end // CSA_RATIO, device=rows.device)
        slots = rows.entry_slots(entry, owner, CSA_RATIO)
        keys, scale = self._ops.gather_index(pages_PB, slots, self._geometry.index())
        found = []
        for tile in _tiles(span.rows, keys.shape[0]):
            scored = self._ops.indexer_logits(q[tile], weight[tile], keys, scale, visible[tile])
            found.append(self._best(*scored, visible[tile]))
        return found[0] if len(found) == 1 else torch.cat(found)

    def _paged(
        self,
        rows: Rows,
        pages_PB: Tensor,
        part: slice,
        q: Tensor,
        weight: Tensor,
        visible: Tensor,
    ) -> Tensor:
        """Every token reads the keys of its own sequence where they lie."""
        layout: IndexPages = self._geometry.index()
        found = []
        for tile in _tiles(part, rows.tables_NT.shape[1] * layout.page_rows):
            tables = rows.tables_NT[rows.owner_R[tile]]
            scored = self._ops.indexer_logits_paged(
                q[tile], weight[tile], pages_PB, tables, layout, visible[tile]
            )
            found.append(self._best(*scored, visible[tile]))
        return found[0] if len(found) == 1 else torch.cat(found)

    def _best(self, scores_RE: Tensor, maxima_RN: Tensor, visible_R: Tensor) -> Tensor:
        if self._round_scores:
            # Rounding keeps the order, so the largest of a block stays its largest.
            scores_RE, maxima_RN = (x.to(torch.bfloat16).float() for x in (scores_RE, maxima_RN))
        return self._ops.topk_blocks(scores_RE, maxima_RN, visible_R, self._topk)


def _visible_entries(rows: Rows, most: int) -> Tensor:
    entry = torch.arange(most, device=rows.device, dtype=torch.int32)
    return torch.where(entry < rows.visible(CSA_RATIO)[:, None], entry, -1)


def _tiles(part: slice, entries: int) -> list[slice]:
    """Consecutive parts of `part` whose scores fit the fixed budget."""
    step = max(_MOST_SCORES // max(entries, 1), 1)
    return [slice(at, min(at + step, part.stop)) for at in range(part.start, part.stop, step)]
