"""Mixture of experts (deepseek-v4.md 1.4): hash or score routing, routed experts, one shared
expert.

Shape suffixes: R rows, D model width, K active experts, I expert width (2 I: gate and up together).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.ops import ReferenceOps
from model.linear import Linear
from model.ranks.communicator import Communicator


@dataclass(frozen=True)
class Expert:
    """`w13` is gate (W1) and up (W3) in one product."""

    w13: Linear
    w2: Linear


@dataclass(frozen=True)
class Router:
    """fp32. Exactly one of `bias_E` (score routing) and `table_VK` (hash routing; a token's ids
    ascend) is set.
    """

    gate: Linear
    bias_E: Tensor | None
    table_VK: Tensor | None


class Moe:
    def __init__(
        self,
        ops: ReferenceOps,
        router: Router,
        experts: Sequence[Expert],
        shared: Expert,
        *,
        comm: Communicator,
        first: int,
        active: int,
        route_scale: float,
        limit: float,
    ) -> None:
        """`experts` are this rank's, numbered from `first` on; widths may be cut as well."""
        self._ops, self._router = ops, router
        self._comm, self._first = comm, first
        self._experts, self._shared = tuple(experts), shared
        self._active, self._route_scale, self._limit = active, route_scale, limit
        self._stack = _stacked(ops, self._experts, shared)

    def __call__(self, x_RD: Tensor, tokens_R: Tensor) -> Tensor:
        """[R, D] fp32; `tokens_R` lists the real rows' token ids, the rest of R is padding."""
        count = tokens_R.shape[0]
        ids, weights = self._route(x_RD, tokens_R)
        if self._stack is not None:
            part = self._ops.experts(
                x_RD, ids, weights, self._stack, first=self._first, limit=self._limit
            )
            return self._comm.sum_plane(part)
        shared = self._expert(self._shared, x_RD, None)
        # Routed first, in the order of expert ids, then the shared expert; then rank after rank.
        routed = self._routed(x_RD[:count], ids, weights)
        return self._comm.sum_plane(self._ops.pad_rows(routed) + shared)

    def _route(self, x_RD: Tensor, tokens_R: Tensor) -> tuple[Tensor, Tensor]:
        router, count = self._router, tokens_R.shape[0]
        logits = router.gate(x_RD.float())[:count]
        table = None if router.table_VK is None else router.table_VK.index_select(0, tokens_R)
        return self._ops.route(logits, router.bias_E, table, self._active, scale=self._route_scale)

    def _routed(self, x_RD: Tensor, ids_RK: Tensor, weights_RK: Tensor) -> Tensor:
        """Rows grouped by expert; a token's outputs are added in the order of expert ids."""
        flat = ids_RK.reshape(-1)
        order = flat.argsort(stable=True)
        x = x_RD.index_select(0, order // self._active)
        weight = weights_RK.reshape(-1).index_select(0, order)[:, None]
        # Slots of other ranks' experts add nothing here.
        out = torch.zeros((flat.shape[0], x_RD.shape[1]), dtype=torch.float32)
        start = 0
        for number, size in enumerate(torch.bincount(flat).tolist()):
            expert = number - self._first
            if size and 0 <= expert < len(self._experts):
                part = slice(start, start + size)
                y = self._expert(
                    self._experts[expert],
                    self._ops.pad_rows(x[part]),
                    self._ops.pad_rows(weight[part]),
                )
                out.index_copy_(0, order[part], y[:size])
            start += size
        by_slot = out.view(-1, self._active, x_RD.shape[1])
        total = by_slot[:, 0].clone()
        for slot in range(1, self._active):
            total += by_slot[:, slot]
        return total

    def _expert(self, expert: Expert, x_RD: Tensor, weight_R1: Tensor | None) -> Tensor:
        """The routing weight multiplies the intermediate before W2."""
        inner = self._ops.swiglu(expert.w13(x_RD), limit=self._limit)
        if weight_R1 is not None:
            inner = inner * weight_R1
        return expert.w2(inner).float()


def _stacked(ops: ReferenceOps, experts: Sequence[Expert], shared: Expert) -> Any:
    """All experts for one op, if that op exists and every matrix is packed for it."""
    every = [linear for expert in (*experts, shared) for linear in (expert.w13, expert.w2)]
    if any(linear.packed is None or linear.round_input is not None for linear in every):
        return None
    packed = [(expert.w13.packed, expert.w2.packed) for expert in (*experts, shared)]
    return ops.stack_experts(packed[:-1], packed[-1])
