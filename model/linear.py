"""A matrix product whose rows do not depend on each other (architecture.md, "Numerics classes").

Shape suffixes: R rows (padded as the ops want it), K inputs, N outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.ops import ReferenceOps


@dataclass(frozen=True)
class Linear:
    """x W^T. `row_tile` None: all rows in one product; else in tiles of that many rows.

    `round_input`: applied to x in the weight's type before the product (model.rounding).
    """

    weight_NK: Tensor
    row_tile: int | None = None
    round_input: Callable[[Tensor], Tensor] | None = None

    @property
    def packed(self) -> Any:
        """The weight in the form of some ops, if it is kept in that."""
        return None

    def __call__(self, x_RK: Tensor) -> Tensor:
        x = x_RK.to(self.weight_NK.dtype)
        if self.round_input is not None:
            x = self.round_input(x)
        if self.row_tile is None or x.shape[0] <= self.row_tile:
            return F.linear(x, self.weight_NK)
        return torch.cat([F.linear(part, self.weight_NK) for part in torch.split(x, self.row_tile)])


@dataclass(frozen=True)
class PackedLinear(Linear):
    """The product of `ops`; `weight_NK` is empty, because the packed form is the only one kept."""

    ops: ReferenceOps | None = None
    kept: Any = None

    @property
    def packed(self) -> Any:
        return self.kept

    @property
    def outputs(self) -> int:
        return int(self.kept.outputs)

    def __call__(self, x_RK: Tensor, out_RN: Tensor | None = None) -> Tensor:
        """`out_RN`: where the product goes, if given; its rows may lie apart."""
        assert self.ops is not None
        x = x_RK if self.round_input is None else self.round_input(x_RK)
        return self.ops.product(x, self.kept, out_RN)


def linear(
    ops: ReferenceOps,
    weight_NK: Tensor,
    row_tile: int | None,
    round_input: Callable[[Tensor], Tensor] | None = None,
) -> Linear:
    """A product of this weight in the best form that `ops` has."""
    kept = ops.pack(weight_NK) if weight_NK.dtype == torch.float32 else None
    if kept is None:
        return Linear(weight_NK, row_tile, round_input)
    return PackedLinear(weight_NK.new_empty(0), None, round_input, ops, kept)


def side_by_side(linears: Sequence[Linear], parts_RK: Sequence[Tensor]) -> Tensor:
    """[R, N + N + ...]: the product of each part with its own weight."""
    packed = [each for each in linears if isinstance(each, PackedLinear)]
    if len(packed) < len(linears):
        pairs = zip(linears, parts_RK, strict=True)
        return torch.cat([each(part.contiguous()) for each, part in pairs], -1)
    widths = [each.outputs for each in packed]
    out = torch.empty((parts_RK[0].shape[0], sum(widths)))
    for each, part, column in zip(packed, parts_RK, torch.split(out, widths, -1), strict=True):
        each(part, column)
    return out
