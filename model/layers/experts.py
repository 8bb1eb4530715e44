"""The experts of one layer that a rank holds, whole or in part: from rows to inner channels, and
from inner channels to outputs (deepseek-v4.md 1.4).

Between the two a rank may fetch the inner channels that others made (model.layers.moe).

Shape suffixes: R rows, D model width, K active experts, I inner channels (2 I: gate and up
together), N slots (a row and one of its experts) by expert and then by row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from kernels.ops import ReferenceOps
from kernels.reference.moe import part_size
from model.linear import Linear


@dataclass(frozen=True)
class Expert:
    """`w13` is gate (W1) and up (W3) in one product."""

    w13: Linear
    w2: Linear


class Experts(Protocol):
    """A rank's experts. Rows beyond those of `ids_RK` are padding."""

    def whole(self, x_RD: Tensor, ids_RK: Tensor, weights_RK: Tensor) -> Tensor:
        """[R, D] of experts that are all here, and whole."""

    def up(self, x_RD: Tensor, ids_RK: Tensor, weights_RK: Tensor) -> tuple[Tensor, Tensor]:
        """Weighted inner channels [N, I] of the routed experts here, and [R, I] of the shared."""

    def down(self, inner_NI: Tensor, shared_RI: Tensor, ids_RK: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs [R, D] of the routed experts here, added, and of the shared one."""


def experts_of(
    ops: ReferenceOps,
    experts: Sequence[Expert],
    shared: Expert,
    *,
    first: int,
    total: int,
    outputs: int,
    limit: float,
) -> Experts:
    """Experts `first`, `first + 1`, ... of `total`, in the best form that `ops` has. `outputs`: of
    a routed expert here.
    """
    every = [linear for expert in (*experts, shared) for linear in (expert.w13, expert.w2)]
    if all(linear.packed is not None and linear.round_input is None for linear in every):
        packed = [(expert.w13.packed, expert.w2.packed) for expert in (*experts, shared)]
        stack = ops.stack_experts(packed[:-1], packed[-1], first=first, unit=part_size(total))
        if stack is not None:
            return StackedExperts(ops, stack, limit)
    return ListedExperts(ops, tuple(experts), shared, first, total, outputs, limit)


@dataclass(frozen=True)
class StackedExperts:
    """All in one call."""

    ops: ReferenceOps
    stack: Any
    limit: float

    def whole(self, x_RD: Tensor, ids_RK: Tensor, weights_RK: Tensor) -> Tensor:
        return self.ops.experts(x_RD, ids_RK, weights_RK, self.stack, limit=self.limit)

    def up(self, x_RD: Tensor, ids_RK: Tensor, weights_RK: Tensor) -> tuple[Tensor, Tensor]:
        return self.ops.experts_up(x_RD, ids_RK, weights_RK, self.stack, limit=self.limit)

    def down(self, inner_NI: Tensor, shared_RI: Tensor, ids_RK: Tensor) -> tuple[Tensor, Tensor]:
        return self.ops.experts_down(inner_NI, shared_RI, ids_RK, self.stack)


@dataclass(frozen=True)
class ListedExperts:
    """One product after the other."""

    ops: ReferenceOps
    experts: tuple[Expert, ...]
    shared: Expert
    first: int
    total: int
    outputs: int
    """Of a routed expert's W2 here."""
    limit: float

    def whole(self, x_RD: Tensor, ids_RK: Tensor, weights_RK: Tensor) -> Tensor:
        routed, shared = self.down(*self.up(x_RD, ids_RK, weights_RK), ids_RK)
        return routed + shared

    def up(self, x_RD: Tensor, ids_RK: Tensor, weights_RK: Tensor) -> tuple[Tensor, Tensor]:
        slots, sizes = self._slots(ids_RK)
        x = torch.split(x_RD.index_select(0, slots // ids_RK.shape[1]), sizes)
        parts = [
            self._inner(expert, self.ops.pad_rows(part))[: len(part)]
            for expert, part in zip(self.experts, x, strict=True)
            if len(part)
        ]
        shared = self._inner(self.shared, x_RD)
        if not parts:
            return shared[:0], shared
        # The routing weight multiplies the intermediate before W2.
        return torch.cat(parts) * weights_RK.reshape(-1).index_select(0, slots)[:, None], shared

    def down(self, inner_NI: Tensor, shared_RI: Tensor, ids_RK: Tensor) -> tuple[Tensor, Tensor]:
        slots, sizes = self._slots(ids_RK)
        shared = self.shared.w2(shared_RI).float()
        # Slots of other ranks' experts add nothing here.
        rows, active = ids_RK.shape
        y = shared.new_zeros((rows * active, self.outputs))
        inner, places = torch.split(inner_NI, sizes), torch.split(slots, sizes)
        for expert, part, place in zip(self.experts, inner, places, strict=True):
            if len(part):
                out = expert.w2(self.ops.pad_rows(part)).float()
                y.index_copy_(0, place, out[: len(part)])
        routed = self.ops.add_experts(y.view(rows, active, -1), ids_RK, experts=self.total)
        return self.ops.pad_rows(routed), shared

    def _inner(self, expert: Expert, x_RD: Tensor) -> Tensor:
        return self.ops.swiglu(expert.w13(x_RD), limit=self.limit)

    def _slots(self, ids_RK: Tensor) -> tuple[Tensor, list[int]]:
        """This rank's slots, by expert and then ascending, and how many each expert has."""
        flat = ids_RK.reshape(-1)
        sizes = torch.bincount(flat, minlength=self.total).tolist()
        before, mine = sum(sizes[: self.first]), sizes[self.first :][: len(self.experts)]
        return flat.argsort(stable=True)[before : before + sum(mine)], mine
