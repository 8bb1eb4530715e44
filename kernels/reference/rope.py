"""Rotary embedding: interleaved pairs, last dimensions, fp32, YaRN without mscale (2.2, T1-T3).

Shape suffixes: R rows, P pairs, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from kernels.reference.lanes import full_lanes
from kernels.reference.norm import rms_norm


def frequencies(dim: int, theta: float, scaling: Mapping[str, float] | None) -> Tensor:
    """[P] fp32 angular frequencies; `scaling` has factor, original, beta_fast, beta_slow or is
    None.
    """
    freq = 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
    if scaling is None:
        return freq

    def pair_of(rotations: float) -> float:
        period = scaling["original"] / (rotations * 2 * math.pi)
        return dim * math.log(period) / (2 * math.log(theta))

    low = max(math.floor(pair_of(scaling["beta_fast"])), 0)
    high: float = min(math.ceil(pair_of(scaling["beta_slow"])), dim - 1)
    if high == low:
        high += 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    keep = 1 - ramp
    return freq / scaling["factor"] * (1 - keep) + freq * keep


def cos_sin(positions_R: Tensor, freq_P: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [R, P] of fp32 angles."""
    angle = positions_R.to(torch.float32)[:, None] * freq_P
    return full_lanes(torch.cos, angle), full_lanes(torch.sin, angle)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, inverse: bool = False) -> Tensor:
    """Rotate the last 2 P channels of fp32 `x` [R, ..., C]; cos and sin are [R, P]."""
    rope = 2 * cos.shape[-1]
    shape = (x.shape[0], *(1,) * (x.dim() - 2), cos.shape[-1])
    c, s = cos.view(shape), sin.view(shape)
    if inverse:
        s = -s
    out = x.clone()
    even, odd = x[..., -rope::2], x[..., x.shape[-1] - rope + 1 :: 2]
    out[..., -rope::2] = even * c - odd * s
    out[..., x.shape[-1] - rope + 1 :: 2] = even * s + odd * c
    return out


def norm_rotate(
    x: Tensor, weight_C: Tensor | None, cos: Tensor, sin: Tensor, *, eps: float
) -> Tensor:
    """RMS norm of the last dimension, then rotation; fp32."""
    return rotate(rms_norm(x, weight_C, eps=eps), cos, sin)
