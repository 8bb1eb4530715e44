"""The precision that a reference computes in: fp32, or float64 if it was given float64."""

from __future__ import annotations

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def rms_scaled(x: Tensor, weight_C: Tensor | None, *, eps: float) -> Tensor:
    """RMSNorm of the last dimension in the precision of `wide` (deepseek-v4.md 1.3)."""
    x = wide(x)
    scaled = x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)
    return scaled if weight_C is None else scaled * weight_C


def rotated(x: Tensor, cos_RP: Tensor, sin_RP: Tensor, *, inverse: bool = False) -> Tensor:
    """`x` [R, ..., C] with its last 2 P channels rotated as interleaved pairs (2.2, T1)."""
    shape = (x.shape[0], *(1,) * (x.dim() - 2), cos_RP.shape[1])
    cos, sin = cos_RP.view(shape).to(x.dtype), sin_RP.view(shape).to(x.dtype)
    sin = -sin if inverse else sin
    rope = 2 * cos_RP.shape[1]
    pairs = x[..., x.shape[-1] - rope :].reshape(*x.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)
    return torch.cat((x[..., : x.shape[-1] - rope], turned), -1)
