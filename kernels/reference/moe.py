"""Mixture of experts: routing and the clamped SwiGLU (deepseek-v4.md 1.4, T5, T6, T9).

Shape suffixes: R rows, E experts, K active experts, I expert width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.reference.lanes import silu, softplus
from kernels.reference.select import topk_lowest


def route_scores(logits_RE: Tensor) -> Tensor:
    """sqrt(softplus) of fp32 router logits."""
    return torch.sqrt(softplus(logits_RE))


def pick_experts(scores_RE: Tensor, bias_E: Tensor, k: int) -> Tensor:
    """Expert ids [R, K], ascending. The bias takes part in the choice only."""
    return topk_lowest(scores_RE + bias_E, k)


# Below the smallest score fp32 can hold, sqrt(2^-149): it turns 0 / 0 into 0 and nothing else. A
# floor of 1e-20 would shrink the weights of tokens whose chosen logits lie between -104 and -92.
_LEAST_TOTAL = 1e-30


def route_weights(scores_RE: Tensor, ids_RK: Tensor, *, scale: float) -> Tensor:
    """Normalised weights [R, K] of the chosen experts; the sum is floored (T9)."""
    chosen = scores_RE.gather(1, ids_RK)
    total = chosen[:, 0].clone()
    for slot in range(1, ids_RK.shape[1]):
        total += chosen[:, slot]
    return chosen / total.clamp_min(_LEAST_TOTAL)[:, None] * scale


def route(
    logits_RE: Tensor, bias_E: Tensor | None, table_RK: Tensor | None, k: int, *, scale: float
) -> tuple[Tensor, Tensor]:
    """Expert ids [R, K], ascending, and their weights. `table_RK`: ids by hash, else by score."""
    scores = route_scores(logits_RE)
    if table_RK is not None:
        ids = table_RK
    else:
        ids = pick_experts(scores, scores.new_zeros(()) if bias_E is None else bias_E, k)
    return ids, route_weights(scores, ids, scale=scale)


def swiglu(gate_up_RI: Tensor, *, limit: float) -> Tensor:
    """silu(min(gate, limit)) * clamp(up, -limit, limit) of [R, 2 I]; fp32. limit 0: no clamp."""
    gate, up = gate_up_RI.float().chunk(2, -1)
    if limit > 0:
        gate, up = gate.clamp_max(limit), up.clamp(-limit, limit)
    return silu(gate) * up
