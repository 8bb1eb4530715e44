"""The roundings that serving applies to caches (deepseek-v4.md 5.4), straight-through."""

from __future__ import annotations

import torch
from torch import Tensor

FP4_LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def _straight_through(x: Tensor, rounded: Tensor) -> Tensor:
    result: Tensor = x + (rounded - x).detach()
    return result


def round_fp8(x: Tensor, rope_dims: int, block: int = 64) -> Tensor:
    """e4m3 on all but the last `rope_dims` channels (those bf16), blocks of 64, the last shorter.

    The scale is 2^ceil(log2(max(amax, 1e-4) / 448)).
    """
    nope, rope = x.detach()[..., :-rope_dims], x.detach()[..., -rope_dims:]
    parts = []
    for part in torch.split(nope, block, dim=-1):
        amax = part.abs().amax(-1, keepdim=True).clamp_min(1e-4)
        scale = torch.exp2(torch.ceil(torch.log2(amax / 448.0)))
        parts.append((part / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale)
    return _straight_through(x, torch.cat([*parts, rope.to(torch.bfloat16).float()], dim=-1))


def hadamard(size: int) -> Tensor:
    """The normalized Walsh-Hadamard matrix [size, size]; symmetric and orthogonal."""
    h = torch.ones(1, 1)
    while h.shape[0] < size:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)], 0)
    result: Tensor = h * size**-0.5
    return result


def round_fp4(x: Tensor, block: int = 32) -> Tensor:
    """Hadamard rotation, then e2m1 in blocks of 32 with power-of-two scales."""
    rotated = x @ hadamard(x.shape[-1]).to(x.dtype)
    parts = torch.unflatten(rotated.detach(), -1, (-1, block))
    amax = parts.abs().amax(-1, keepdim=True).clamp_min(6 * 2.0**-126)
    scale = torch.exp2(torch.ceil(torch.log2(amax / 6.0)))
    levels = torch.tensor(FP4_LEVELS)
    middles = (levels[1:] + levels[:-1]) / 2
    codes = torch.bucketize((parts / scale).abs(), middles)
    rounded = (levels[codes] * parts.sign() * scale).flatten(-2)
    return _straight_through(rotated, rounded)
