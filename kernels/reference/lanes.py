"""Shapes that keep CPU kernels independent of how many rows share a call (architecture.md,
"Numerics classes").

Vectorised and scalar code paths of one elementwise function may differ by an ulp, and a matmul with
few rows may take another code path. Both are avoided by shape: no scalar tails, at least 16 rows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

ROW_MULTIPLE = 16
_LANES = 32


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def pad_rows(x: Tensor, *, multiple: int = ROW_MULTIPLE) -> Tensor:
    """`x` with zero rows appended until the row count is a positive multiple of `multiple`."""
    rows = x.shape[0]
    missing = max(round_up(rows, multiple), multiple) - rows
    if not missing:
        return x
    return torch.cat((x, x.new_zeros((missing, *x.shape[1:]))))


def full_lanes(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`function(x)` elementwise with no scalar tail."""
    flat = x.contiguous()
    tail = flat.numel() % _LANES
    if not tail:
        return function(flat)
    padded = F.pad(flat.view(-1), (0, _LANES - tail))
    return function(padded)[: flat.numel()].view(x.shape)


def exp(x: Tensor) -> Tensor:
    return full_lanes(torch.exp, x)


def sigmoid(x: Tensor) -> Tensor:
    return full_lanes(torch.sigmoid, x)


def silu(x: Tensor) -> Tensor:
    return full_lanes(F.silu, x)


def softplus(x: Tensor) -> Tensor:
    return full_lanes(F.softplus, x)
