"""Compressor pooling: channel-wise softmax over a window's slots (deepseek-v4.md 2.3).

Shape suffixes: N windows, S slots, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.reference.lanes import exp


def pool_windows(kv_NSC: Tensor, score_NSC: Tensor) -> Tensor:
    """[N, C] = sum over slots of softmax(score) * kv, per channel; fp32.

    A slot with score -inf takes no part; every window needs one finite slot per channel. Slots are
    folded in token order, one after the other, so the sum does not depend on how many windows share
    the call.
    """
    weight = exp(score_NSC - score_NSC.amax(1, keepdim=True))
    product = weight * kv_NSC
    total, norm = torch.zeros_like(product[:, 0]), torch.zeros_like(product[:, 0])
    for slot in range(kv_NSC.shape[1]):
        total += product[:, slot]
        norm += weight[:, slot]
    return total / norm
