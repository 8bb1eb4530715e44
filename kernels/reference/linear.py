"""Dense products x W^T, every row by itself (architecture.md, "Numerics classes").

Shape suffixes: R rows (tokens), G groups, K inputs, N outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.reference.wide import wide

LINEAR_TILE = 64
"""Rows of a kernel's tile if the caller does not choose: it costs one row little more than 16."""


def linear(
    x_RGK: Tensor, weight_GNK: Tensor, *, dtype: torch.dtype, tile: int = LINEAR_TILE
) -> Tensor:
    """[R, G, N] in `dtype`: each group of channels times its own weight, summed in fp32.

    x and the weight have one type, bfloat16 for a kernel. `tile` (16, 64 or 128) is how many rows
    share a kernel's tile; it does not change the meaning.
    """
    del tile
    x = wide(x_RGK)
    return torch.einsum("rgk,gnk->rgn", x, weight_GNK.to(x.dtype)).to(dtype)
