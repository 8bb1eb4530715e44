"""RMSNorm and RoPE of queries and window rows, in one pass or alone (deepseek-v4.md 2.1, 2.2).

Shape suffixes: R rows (tokens), H heads, C channels, P rotated pairs, B bytes of a page.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.reference.pages import KvPages
from kernels.reference.quantize_kv import quantize_kv
from kernels.reference.wide import rms_scaled, rotated, wide


def norm_rope(
    x_RHC: Tensor,
    weight_C: Tensor | None,
    cos_RP: Tensor,
    sin_RP: Tensor,
    *,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """[R, H, C] in `dtype`: every head normalised (unweighted if `weight_C` is None), then the last
    2 P channels rotated by the token's angles (fp32 tables); rounded once, at the end.
    """
    return rotated(rms_scaled(x_RHC, weight_C, eps=eps), cos_RP, sin_RP).to(dtype)


def norm_rope_quantize(
    x_RC: Tensor,
    weight_C: Tensor,
    cos_RP: Tensor,
    sin_RP: Tensor,
    slots_R: Tensor,
    pages_PB: Tensor,
    layout: KvPages,
    *,
    eps: float,
) -> None:
    """The same for window rows, which go to their slots of the paged cache; slot -1 is skipped."""
    x = rotated(rms_scaled(x_RC, weight_C, eps=eps), cos_RP, sin_RP)
    quantize_kv(x, slots_R, pages_PB, layout)


def rms_norm(x_RD: Tensor, weight_D: Tensor, *, eps: float, dtype: torch.dtype) -> Tensor:
    """[R, D] in `dtype`: rows normalised in fp32, weighted, rounded once (1.3). Any width."""
    return rms_scaled(x_RD, weight_D, eps=eps).to(dtype)


def rope(x_RHC: Tensor, cos_RP: Tensor, sin_RP: Tensor, *, dtype: torch.dtype) -> Tensor:
    """[R, H, C] in `dtype`: the last 2 P channels rotated, without a norm (index queries, 2.4)."""
    return rotated(wide(x_RHC), cos_RP, sin_RP).to(dtype)
