"""Mixture of experts: routing and the clamped SwiGLU (deepseek-v4.md 1.4, T5, T6, T9).

Shape suffixes: R rows, E experts, K active experts, I expert width, D model width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

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


_MOST_PARTS = 8


def part_size(experts: int) -> int:
    """Experts of one part: all of them lie in 1, 2, 4 or 8 equal parts, as many as their number
    allows. See `add_experts`.
    """
    return experts // math.gcd(experts, _MOST_PARTS)


def add_experts(y_RKD: Tensor, ids_RK: Tensor, *, experts: int) -> Tensor:
    """[R, D]: a row's outputs in ascending order of experts within each part, then the parts as a
    binary tree.

    So 2, 4 or 8 ranks that hold consecutive experts each hold a whole branch, and adding up what
    they have is the same sum. Slots of experts that are not there are zeros.
    """
    unit = part_size(experts)
    parts = y_RKD.new_zeros((y_RKD.shape[0], experts // unit, y_RKD.shape[2]))
    row = torch.arange(y_RKD.shape[0])
    for slot in range(ids_RK.shape[1]):
        part = ids_RK[:, slot] // unit
        parts[row, part] = parts[row, part] + y_RKD[:, slot]
    return add_branches(parts.unbind(1))


def add_branches(parts: Sequence[Tensor]) -> Tensor:
    """Sum of neighbours, of neighbouring sums, and so on."""
    while len(parts) > 1:
        pairs = [a + b for a, b in zip(parts[::2], parts[1::2], strict=False)]
        parts = [*pairs, *parts[2 * len(pairs) :]]
    return parts[0]
