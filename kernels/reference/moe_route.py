"""Router and shared expert beside the grouped experts (deepseek-v4.md 1.4, T5, T6, T9).

Shape suffixes: R rows (tokens), E experts, K active experts, I expert width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.reference.wide import wide

LEAST_TOTAL = 1e-30
"""Below the smallest score that fp32 holds: 0 / 0 becomes 0 and nothing else changes (T9)."""


def moe_route(
    logits_RE: Tensor, bias_E: Tensor | None, ids_RK: Tensor | None, active: int, *, scale: float
) -> tuple[Tensor, Tensor]:
    """Expert ids int32 [R, K], ascending, and their weights fp32 [R, K].

    Scores are sqrt(softplus(logits)) (fp32). `ids_RK` (int32, ascending) are given in hash layers;
    else the K best of score + bias are taken, ties to the lower id. Weights are the chosen scores
    over their sum, times `scale`; the bias takes part in the choice only.
    """
    score = torch.sqrt(torch.nn.functional.softplus(wide(logits_RE)))
    if ids_RK is not None:
        ids = ids_RK.long()
    else:
        choice = score if bias_E is None else score + bias_E
        # In fp32, whatever the sums were made in: what ties there is a tie.
        order = choice.to(torch.float32).sort(dim=1, descending=True, stable=True).indices
        ids = order[:, :active].sort(1).values
    chosen = score.gather(1, ids)
    total = chosen[:, 0].clone()
    for slot in range(1, ids.shape[1]):
        total += chosen[:, slot]
    weights = chosen / total.clamp_min(LEAST_TOTAL)[:, None] * scale
    return ids.to(torch.int32), weights.to(torch.float32)


def swiglu(gate_up_RI: Tensor, *, limit: float, dtype: torch.dtype) -> Tensor:
    """[R, I] in `dtype`: silu(min(gate, limit)) * clamp(up) of [R, 2 I]. limit 0: no clamp."""
    gate, up = wide(gate_up_RI).chunk(2, 1)
    if limit > 0:
        gate, up = gate.clamp_max(limit), up.clamp(-limit, limit)
    return (torch.nn.functional.silu(gate) * up).to(dtype)
