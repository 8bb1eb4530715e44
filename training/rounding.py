"""Serving's own roundings (`kernels.reference.rows`), straight through for gradients.

A rounded value is the one that serving computes, bit for bit; the gradient passes as if nothing had
been rounded. `Cache` names what a cache holds: the comparison of formats in evaluation, and what a
share of training steps is told to live with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kernels.reference import rows
from kernels.reference.hadamard import hadamard_matrix


def _straight_through(x: Tensor, rounded: Tensor) -> Tensor:
    # In this order: x - x is exactly 0, so that the value is the rounded one to the last bit.
    result: Tensor = rounded.detach() + (x - x.detach())
    return result


def _by_rows(x: Tensor) -> Tensor:
    return x.detach().reshape(-1, x.shape[-1]).contiguous()


def round_fp8(x: Tensor, rope_dims: int) -> Tensor:
    """e4m3 on all but the last `rope_dims` channels (those bf16), one scale per 64."""
    rounded = rows.fp8_round(_by_rows(x), x.shape[-1] - rope_dims)
    return _straight_through(x, rounded.view_as(x))


def round_bf16(x: Tensor) -> Tensor:
    """bfloat16, as a value of x's type."""
    return _straight_through(x, rows.bf16_round(x.detach()))


def round_fp4_rows(x: Tensor, rope_dims: int) -> Tensor:
    """e2m1 on all but the last `rope_dims` channels (those bf16), one scale per 32. Serving has no
    such cache: it is the comparison's last step down.
    """
    flat = _by_rows(x)
    nope = x.shape[-1] - rope_dims
    parts = [rows.fp4_round(flat[:, :nope].contiguous()), rows.bf16_round(flat[:, nope:])]
    return _straight_through(x, torch.cat(parts, 1).view_as(x))


def round_fp4(x: Tensor) -> Tensor:
    """Index queries and keys: Hadamard rotation, then e2m1 in blocks of 32."""
    rotated = x @ hadamard_matrix(x.shape[-1]).to(x.dtype) * x.shape[-1] ** -0.5
    return _straight_through(rotated, rows.fp4_round(_by_rows(rotated)).view_as(rotated))


@dataclass(frozen=True)
class Cache:
    """Formats of attention rows and of index keys (and queries)."""

    kv: Literal["fp32", "bf16", "fp8", "fp4"] = "fp32"
    index: Literal["fp32", "bf16", "fp4"] = "fp32"

    def row(self, x: Tensor, rope_dims: int) -> Tensor:
        """An attention row as the cache gives it back."""
        match self.kv:
            case "fp8":
                return round_fp8(x, rope_dims)
            case "fp4":
                return round_fp4_rows(x, rope_dims)
            case "bf16":
                return round_bf16(x)
            case _:
                return x

    def key(self, x: Tensor) -> Tensor:
        """An index key or query as the indexer sees it."""
        match self.index:
            case "fp4":
                return round_fp4(x)
            case "bf16":
                return round_bf16(x)
            case _:
                return x


PLAIN = Cache()
SERVED = Cache("fp8", "fp4")
"""What serving does with an FP8 cache, its default."""
