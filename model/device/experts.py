"""Mixture of experts on a device (deepseek-v4.md 1.4): routed experts as grouped products, one
shared expert as two dense ones.

Shape suffixes: R rows (tokens), D model width, E experts, K active experts, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.device import ReferenceDeviceOps
from model.device.weights import ExpertFormat, Experts, Product


@dataclass(frozen=True)
class MoeWeights:
    """Exactly one of `bias_E` and `table_VK` (int32, a token's ids ascend) is set."""

    gate: Product
    bias_E: Tensor | None
    table_VK: Tensor | None
    experts: Experts
    shared_w13: Product
    shared_w2: Product


class Moe:
    def __init__(
        self,
        ops: ReferenceDeviceOps,
        weights: MoeWeights,
        *,
        active: int,
        route_scale: float,
        limit: float,
        dtype: torch.dtype,
        rounds: bool,
        exact: bool,
        tile: int,
    ) -> None:
        """`rounds`: activations to e4m3 per 128 channels before every product. `tile`: pairs of a
        product's tile in class `exact`.
        """
        self._ops, self._w = ops, weights
        self._active, self._route_scale, self._limit = active, route_scale, limit
        self._dtype, self._rounds, self._exact, self._tile = dtype, rounds, exact, tile

    def __call__(self, x_RD: Tensor, tokens_R: Tensor) -> Tensor:
        """[R, D] in the activation type."""
        ops, w, e = self._ops, self._w, self._w.experts
        logits = w.gate(ops, x_RD, torch.float32)
        hashed = None if w.table_VK is None else w.table_VK.index_select(0, tokens_R)
        ids, share = ops.moe_route(logits, w.bias_E, hashed, self._active, scale=self._route_scale)
        count = e.w13_ENX.shape[0]
        plan = ops.moe_plan(ids, experts=count, tile=self._tile_for(x_RD.shape[0], count))
        x, scale = self._rounded(x_RD)
        h = ops.moe_up(x, scale, e.w13_ENX, e.w13_scale_ENX, share, plan, limit=self._limit)
        h, scale = self._rounded(h)
        y = ops.moe_down(h, scale, e.w2_EDX, e.w2_scale_EDX, plan)
        inner = ops.swiglu(
            w.shared_w13(ops, x_RD, torch.float32), limit=self._limit, dtype=self._dtype
        )
        return ops.moe_combine(y, w.shared_w2(ops, inner, self._dtype), plan)

    def _tile_for(self, rows: int, experts: int) -> int:
        """One tile for prompts and answers in class `exact`; else what fills it."""
        if self._exact:
            return self._tile
        each = rows * self._active // experts
        return 16 if each <= 16 else 64 if each <= 64 else 128

    def _rounded(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        if self._w.experts.kind is ExpertFormat.E4M3:
            return self._ops.quantize_rows(x)
        if self._rounds:
            return self._ops.round_rows(x).to(x.dtype), None
        return x, None
