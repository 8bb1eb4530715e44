"""One block: mHC-wrapped attention, then mHC-wrapped experts (deepseek-v4.md 1.3, 4).

Shape suffixes: R rows, S streams, D model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from kernels.ops import ReferenceOps
from model.layers.attention import Attended, Attention
from model.layers.moe import Moe
from model.rows import Rows


@dataclass(frozen=True)
class HyperConnection:
    """fp32 tensors of one mHC instance and its constants."""

    fn: Tensor
    base: Tensor
    scale: Tensor
    streams: int
    iters: int
    eps: float
    norm_eps: float

    def mix(self, ops: ReferenceOps, streams_RSD: Tensor) -> Tensor:
        return ops.mixing(streams_RSD, self.fn, norm_eps=self.norm_eps)

    def collapse(self, ops: ReferenceOps, streams_RSD: Tensor, mixed: Tensor) -> Tensor:
        pre = ops.input_gates(mixed, self.scale, self.base, streams=self.streams, eps=self.eps)
        return ops.collapse(streams_RSD, pre).to(streams_RSD.dtype)

    def expand(self, ops: ReferenceOps, streams_RSD: Tensor, mixed: Tensor, y_RD: Tensor) -> Tensor:
        post, comb = ops.output_gates(
            mixed, self.scale, self.base, streams=self.streams, iters=self.iters, eps=self.eps
        )
        return ops.expand(streams_RSD, y_RD.to(streams_RSD.dtype), post, comb)


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
        attn_hc: HyperConnection,
        ffn_hc: HyperConnection,
        attn_norm_D: Tensor,
        ffn_norm_D: Tensor,
        norm_eps: float,
    ) -> None:
        self._ops, self._layer = ops, layer
        self._attention, self._moe = attention, moe
        self._attn_hc, self._ffn_hc = attn_hc, ffn_hc
        self._attn_norm_D, self._ffn_norm_D = attn_norm_D, ffn_norm_D
        self._eps = norm_eps

    def __call__(
        self,
        streams_RSD: Tensor,
        rows: Rows,
        tokens_R: Tensor,
        *,
        wanted: Wanted | None,
        evidence_rows: Sequence[int] | None,
    ) -> tuple[Tensor, Attended]:
        """Streams after the block: of all rows, or of `wanted` only (the last block)."""
        ops = self._ops
        caches = [span.cache.layers[self._layer] for span in rows.spans]
        mixed = self._attn_hc.mix(ops, streams_RSD)
        x = self._norm(self._attn_hc.collapse(ops, streams_RSD, mixed), self._attn_norm_D)
        histories = self._attention.absorb(rows, caches, x)
        if wanted is not None:
            streams_RSD, mixed, x = (
                ops.pad_rows(t.index_select(0, wanted.index)) for t in (streams_RSD, mixed, x)
            )
            rows, tokens_R = wanted.rows, tokens_R.index_select(0, wanted.index)
            if evidence_rows is not None:
                evidence_rows = range(rows.count)
        attended = self._attention.attend(rows, caches, x, histories, evidence_rows=evidence_rows)
        streams_RSD = self._attn_hc.expand(ops, streams_RSD, mixed, attended.y_RD)
        mixed = self._ffn_hc.mix(ops, streams_RSD)
        x = self._norm(self._ffn_hc.collapse(ops, streams_RSD, mixed), self._ffn_norm_D)
        return self._ffn_hc.expand(ops, streams_RSD, mixed, self._moe(x, tokens_R)), attended

    def _norm(self, x_RD: Tensor, weight_D: Tensor) -> Tensor:
        return self._ops.rms_norm(x_RD, weight_D, eps=self._eps).to(x_RD.dtype)
