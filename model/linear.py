"""A matrix product whose rows do not depend on each other (architecture.md, "Numerics classes").

Shape suffixes: R rows (a multiple of 16), K inputs, N outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Linear:
    """x W^T. `row_tile` None: all rows in one product; else in tiles of that many rows.

    `round_input`: applied to x in the weight's type before the product (model.rounding).
    """

    weight_NK: Tensor
    row_tile: int | None = None
    round_input: Callable[[Tensor], Tensor] | None = None

    def __call__(self, x_RK: Tensor) -> Tensor:
        x = x_RK.to(self.weight_NK.dtype)
        if self.round_input is not None:
            x = self.round_input(x)
        if self.row_tile is None or x.shape[0] <= self.row_tile:
            return F.linear(x, self.weight_NK)
        return torch.cat([F.linear(part, self.weight_NK) for part in torch.split(x, self.row_tile)])
