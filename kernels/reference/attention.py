"""Attention as parts that share one softmax (deepseek-v4.md 2.5).

Each part sees its own keys (window, heavy entries, selected entries) and returns its row maximum,
sum of exponentials and weighted values; `merge_parts` joins them with the sink. A part's tiles have
a fixed shape, tiles are added in order, and a masked key adds exactly zero, so a token's output
depends only on the keys it sees.

Shape suffixes: N tiles, Q query rows (tokens x heads), K keys, C channels, R rows, H heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.reference.lanes import exp

# Finite on purpose: a part without a visible key must weigh 0, not NaN.
_NO_KEY = -1e30


@dataclass(frozen=True)
class Part:
    """Running maximum, sum of exponentials (both [...]) and unnormalised output [..., C]."""

    top: Tensor
    norm: Tensor
    out: Tensor


def tile_part(q_NQC: Tensor, kv_NKC: Tensor, hidden_NQK: Tensor, *, scale: float) -> Part:
    """One softmax part per tile: query row q of tile n sees the keys of tile n that are not
    hidden.
    """
    score = torch.bmm(q_NQC, kv_NKC.transpose(1, 2)).mul_(scale)
    score.masked_fill_(hidden_NQK, float("-inf"))
    top = score.amax(-1).clamp_min_(_NO_KEY)
    weight = exp(score.sub_(top[..., None]))
    return Part(top, weight.sum(-1), torch.bmm(weight, kv_NKC))


def dense_part(q_QC: Tensor, kv_NKC: Tensor, visible_Q: Tensor, *, scale: float) -> Part:
    """All query rows see the first visible_Q[q] keys of one key list cut into N tiles of K."""
    tiles, keys, _ = kv_NKC.shape
    score = torch.bmm(q_QC.expand(tiles, *q_QC.shape), kv_NKC.transpose(1, 2)).mul_(scale)
    position = torch.arange(tiles * keys).view(tiles, 1, keys)
    score.masked_fill_(position >= visible_Q[:, None], float("-inf"))
    top = score.amax(-1).amax(0).clamp_min_(_NO_KEY)
    weight = exp(score.sub_(top[:, None]))
    norms, outs = weight.sum(-1), torch.bmm(weight, kv_NKC)
    norm, out = torch.zeros_like(top), torch.zeros_like(q_QC)
    for tile in range(tiles):
        norm += norms[tile]
        out += outs[tile]
    return Part(top, norm, out)


def merge_parts(parts: list[Part], sink_H: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Output [R, H, C] of the joint softmax, its maximum and its denominator [R, H].

    The sink adds exp(sink) to the denominator and has no value vector.
    """
    top = sink_H.expand_as(parts[0].top)
    for part in parts:
        top = torch.maximum(top, part.top)
    norm = exp(sink_H - top)
    out = torch.zeros_like(parts[0].out)
    for part in parts:
        share = exp(part.top - top)
        norm = norm + share * part.norm
        out = out + share[..., None] * part.out
    return out / norm[..., None], top, norm


def entry_mass(
    q_RHC: Tensor,
    kv_RKC: Tensor,
    hidden_RK: Tensor,
    top_RH: Tensor,
    norm_RH: Tensor,
    *,
    scale: float,
    heads: int,
) -> Tensor:
    """[R, K]: attention probability of each key, averaged in order over the first `heads` heads."""
    score = torch.bmm(q_RHC, kv_RKC.transpose(1, 2)).mul_(scale)
    score.masked_fill_(hidden_RK[:, None, :], float("-inf"))
    weight = exp(score - top_RH[..., None]) / norm_RH[..., None]
    total = torch.zeros_like(weight[:, 0])
    for head in range(heads):
        total += weight[:, head]
    return total / heads
