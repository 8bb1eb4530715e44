"""Lightning indexer: which compressed entries each query attends to (deepseek-v4.md 2.4).

Shape suffixes: R rows, H index heads, C channels, K selected slots.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.ops import ReferenceOps
from kernels.reference.indexer import KEY_TILE
from kernels.reference.lanes import ROW_MULTIPLE, round_up
from model.cache import LayerCache
from model.codec import RowCodec
from model.config import CSA_RATIO
from model.layers.compressor import Compressor
from model.linear import Linear
from model.rows import Rows, Span

CosSin = tuple[Tensor, Tensor]
_MOST_SCORES = 1 << 20


class Indexer:
    def __init__(
        self,
        ops: ReferenceOps,
        codec: RowCodec,
        *,
        compressor: Compressor,
        wq_b: Linear,
        weights_proj: Linear,
        heads: int,
        dim: int,
        topk: int,
        round_scores: bool = False,
    ) -> None:
        """`round_scores`: to bf16 before the top-k (5.3)."""
        self._ops, self._codec = ops, codec
        self._compressor = compressor
        self._wq_b, self._weights_proj = wq_b, weights_proj
        self._heads, self._dim, self._topk = heads, dim, topk
        self._round_scores = round_scores
        self._scale = float(dim) ** -0.5 * float(heads) ** -0.5

    def absorb(self, rows: Rows, caches: Sequence[LayerCache], x_RD: Tensor) -> None:
        """Add the keys of the windows that these rows complete."""
        entries, carries = self._compressor.absorb(rows, x_RD, [c.index_carry for c in caches])
        keys = entries.values_NC
        if keys.shape[0]:
            keys = self._codec.round_index(keys)
        attached = [c.attached for c in caches]
        entries.store(keys, [c.index_EC for c in caches], rows.share, attached=attached)
        for cache, carry, raw in zip(caches, carries, entries.known, strict=True):
            cache.index_carry = carry
            if cache.trail is not None:
                cache.trail.index_carry = raw

    def select(
        self, rows: Rows, caches: Sequence[LayerCache], x_RD: Tensor, qr_RQ: Tensor, cos_sin: CosSin
    ) -> Tensor:
        """[count, K] selected entries of each real row, ascending, -1 in unused slots."""
        visible = (rows.positions_R[: rows.count] + 1) // CSA_RATIO
        picked = torch.empty((rows.count, self._topk), dtype=torch.int64)
        if int(visible.max()) <= self._topk:
            return self._ops.select_visible(visible.new_zeros((rows.count, 0)), visible, self._topk)
        q = self._wq_b(qr_RQ).float().view(rows.padded, self._heads, self._dim)
        q = self._ops.rotate(q, *cos_sin).view(-1, self._dim)
        q = self._codec.round_index(q).view(rows.padded, self._heads, self._dim)
        weight = self._weights_proj(x_RD).float() * self._scale
        for span, cache in zip(rows.spans, caches, strict=True):
            self._select_span(span, cache.index_EC, q, weight, visible, picked)
        return picked

    def _select_span(
        self, span: Span, keys_EC: Tensor, q: Tensor, weight: Tensor, visible: Tensor, out: Tensor
    ) -> None:
        """Score in tiles of rows, so that no buffer is tokens x context."""
        row, end = span.row, span.row + span.count
        while row < end:
            keys = max(round_up(int(visible[end - 1]), KEY_TILE), KEY_TILE)
            products = self._ops.most_index_products
            room = min(_MOST_SCORES // keys, products // (KEY_TILE * self._heads))
            tile = max(room // ROW_MULTIPLE * ROW_MULTIPLE, ROW_MULTIPLE)
            part = slice(row, min(row + tile, end))
            seen = visible[part]
            scores = self._ops.index_scores(
                q[part], weight[part], keys_EC[: round_up(max(int(seen[-1]), 1), KEY_TILE)], seen
            )
            if self._round_scores:
                scores = self._ops.bf16_round(scores)
            out[part] = self._ops.select_visible(scores, seen, self._topk)
            row = part.stop
