"""RMSNorm: fp32 statistics, fp32 weight, one cast at the end (deepseek-v4.md 1.3).

Shape suffixes: R rows, D channels.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x_RD: Tensor, weight_D: Tensor | None, *, eps: float) -> Tensor:
    """Normalise the last dimension; `weight_D` None is the unweighted form (2.1). Returns fp32."""
    x = x_RD.float()
    mean = (x * x).sum(-1, keepdim=True) / x.shape[-1]
    # 1 / sqrt is correctly rounded in every code path; rsqrt need not be.
    scaled = x * (1.0 / torch.sqrt(mean + eps))
    return scaled if weight_D is None else scaled * weight_D
