"""Mixture of experts (deepseek-v4.md 1.4): hash or score routing, routed experts, one shared
expert.

On several ranks no sum is split: each makes some inner channels of its experts, all of them meet,
and each makes some outputs from all of them. Only the sum over a token's experts is spread over
expert ranks, in branches of the tree that one rank adds too (kernels.reference.moe).

Shape suffixes: R rows, D model width, K active experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.ops import ReferenceOps
from kernels.reference.moe import add_branches
from model.layers.experts import Experts
from model.linear import Linear
from model.ranks.communicator import Communicator


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
        experts: Experts,
        *,
        comm: Communicator,
        active: int,
        route_scale: float,
    ) -> None:
        """`experts` are this rank's."""
        self._ops, self._router, self._experts = ops, router, experts
        self._comm = comm
        self._active, self._route_scale = active, route_scale

    def __call__(self, x_RD: Tensor, tokens_R: Tensor) -> Tensor:
        """[R, D] fp32; `tokens_R` lists the real rows' token ids, the rest of R is padding."""
        ids, weights = self._route(x_RD, tokens_R)
        comm, grid = self._comm, self._comm.grid
        if grid.plane == 1:
            return self._experts.whole(x_RD, ids, weights)
        inner, shared = self._experts.up(x_RD, ids, weights)
        if grid.ep == 1:
            inner, shared = comm.join_plane(inner, shared)
        else:
            inner, (shared,) = comm.join_tensor(inner), comm.join_plane(shared)
        found = comm.gather_plane(*self._experts.down(inner, shared, ids))
        branches = [
            torch.cat([routed for routed, _ in found[at : at + grid.tp]], -1)
            for at in range(0, grid.plane, grid.tp)
        ]
        return add_branches(branches) + torch.cat([shared for _, shared in found], -1)

    def _route(self, x_RD: Tensor, tokens_R: Tensor) -> tuple[Tensor, Tensor]:
        router, count = self._router, tokens_R.shape[0]
        logits = router.gate(x_RD.float())[:count]
        table = None if router.table_VK is None else router.table_VK.index_select(0, tokens_R)
        return self._ops.route(logits, router.bias_E, table, self._active, scale=self._route_scale)
