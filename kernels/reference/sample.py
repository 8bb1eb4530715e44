"""One token per row of logits: temperature, top-k, top-p and a given uniform number; the meaning
of `model.sampler.sample` for a batch on a device.

Shape suffixes: R rows, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sample(
    logits_RV: Tensor,
    uniform_R: Tensor,
    temperature_R: Tensor,
    *,
    top_k_R: Tensor | None = None,
    top_p_R: Tensor | None = None,
) -> Tensor:
    """int32 [R]. Logits are fp32 without nan (-inf: never drawn, one must be finite); the rest is
    float64, top-k int32.

    `uniform_R` in [0, 1) comes from the counter-based generator of (seed, choice, position), so the
    draw is a function of the request. Temperature 0 takes the largest logit. `top_k_R` None or a
    row's 0, and `top_p_R` None or a row's 1, cut nothing. Equal logits: the lower id comes first.
    """
    logits = logits_RV.double()
    greedy = temperature_R <= 0
    heat = torch.where(greedy, 1.0, temperature_R)[:, None]
    scaled = (logits - logits.amax(1, keepdim=True)) / heat
    order = scaled.argsort(dim=1, descending=True, stable=True)
    weight = scaled.gather(1, order).exp()
    rank = torch.arange(logits.shape[1], device=logits.device)
    if top_k_R is not None:
        most = torch.where(top_k_R > 0, top_k_R, logits.shape[1])[:, None]
        weight = weight.masked_fill(rank >= most, 0.0)
    mass = weight.cumsum(1)
    if top_p_R is not None:
        # The smallest set that reaches top_p; the first token always belongs to it.
        keep = (mass < top_p_R[:, None] * mass[:, -1:]).sum(1, keepdim=True) + 1
        keep = torch.where(top_p_R[:, None] < 1.0, keep, logits.shape[1])
        weight = weight.masked_fill(rank >= keep, 0.0)
        mass = weight.cumsum(1)
    # A uniform number next to 1 may round to the whole mass, which nothing exceeds.
    whole = mass[:, -1:]
    threshold = torch.minimum(uniform_R[:, None] * whole, whole.nextafter(torch.zeros_like(whole)))
    place = torch.where(greedy, 0, (mass <= threshold).sum(1))
    return order.gather(1, place[:, None])[:, 0].to(torch.int32)
