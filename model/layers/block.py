"""One block: mHC-wrapped attention, then mHC-wrapped experts (deepseek-v4.md 1.3, 4).

Shape suffixes: R rows, S streams, D model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from kernels.ops import ReferenceOps
from kernels.reference.mhc import HyperWeights
from model.cache import LayerCache
from model.layers.attention import Attended, Attention
from model.layers.moe import Moe
from model.rows import Rows


@dataclass(frozen=True)
class Wanted:
    """The only rows whose output the last block owes: row numbers, and the same as a pass."""

    index: Tensor
    rows: Rows


class Block:
    def __init__(
        self,
        ops: ReferenceOps,
        layer: int,
        *,
        attention: Attention,
        moe: Moe,
        attn_hc: HyperWeights,
        ffn_hc: HyperWeights,
        attn_norm_D: Tensor,
        ffn_norm_D: Tensor,
    ) -> None:
        self._ops, self._layer = ops, layer
        self._attention, self._moe = attention, moe
        self._attn_hc, self._ffn_hc = attn_hc, ffn_hc
        self._attn_norm_D, self._ffn_norm_D = attn_norm_D, ffn_norm_D

    def __call__(
        self,
        streams_RSD: Tensor,
        rows: Rows,
        tokens_R: Tensor,
        *,
        wanted: Wanted | None = None,
        evidence_rows: Sequence[int] | None = None,
        caches: Sequence[LayerCache] | None = None,
    ) -> tuple[Tensor, Attended]:
        """Streams after the block: of all rows, or of `wanted` only (the last block).

        `caches`, one a span, stand in for those of the spans' sequences (a draft's copies).
        """
        ops = self._ops
        caches = caches or [span.cache.layers[self._layer] for span in rows.spans]
        x, mixed = ops.enter(streams_RSD, self._attn_hc, self._attn_norm_D)
        histories = self._attention.absorb(rows, caches, x)
        if wanted is not None:
            streams_RSD, x, *kept = (
                ops.pad_rows(t.index_select(0, wanted.index)) for t in (streams_RSD, x, *mixed)
            )
            mixed = tuple(kept)
            rows, tokens_R = wanted.rows, tokens_R.index_select(0, wanted.index)
            if evidence_rows is not None:
                evidence_rows = [span.row + span.count - 1 for span in rows.spans]
        attended = self._attention.attend(rows, caches, x, histories, evidence_rows=evidence_rows)
        return self._rest(streams_RSD, mixed, attended.y_RD, tokens_R), attended

    def window_rows(self, streams_RSD: Tensor, rows: Rows) -> Tensor:
        """[R, C]: what the block's window keeps of each row; no cache is touched."""
        x, _ = self._ops.enter(streams_RSD, self._attn_hc, self._attn_norm_D)
        return self._attention.window_rows(rows, x)

    def around(
        self, streams_RSD: Tensor, rows: Rows, tokens_R: Tensor, caches: Sequence[LayerCache]
    ) -> Tensor:
        """Streams of rows that see the window and each other (`Attention.attend_around`)."""
        x, mixed = self._ops.enter(streams_RSD, self._attn_hc, self._attn_norm_D)
        y = self._attention.attend_around(rows, caches, x)
        return self._rest(streams_RSD, mixed, y, tokens_R)

    def context_rows(self, features_RD: Tensor, rows: Rows) -> Tensor:
        """[R, C]: window rows of context features, which are no streams (DSpark, 1.7)."""
        return self._attention.window_rows(rows, features_RD)

    def _rest(
        self, streams_RSD: Tensor, mixed: tuple[Tensor, ...], y_RD: Tensor, tokens_R: Tensor
    ) -> Tensor:
        """Everything after the attention sublayer's output `y_RD`."""
        ops = self._ops
        streams_RSD = ops.leave(streams_RSD, self._attn_hc, mixed, y_RD)
        x, mixed = ops.enter(streams_RSD, self._ffn_hc, self._ffn_norm_D)
        # Of these streams nobody else knows: memory that is warm, where new pages would not be.
        return ops.leave(streams_RSD, self._ffn_hc, mixed, self._moe(x, tokens_R), in_place=True)
