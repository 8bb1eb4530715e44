"""Hyper-connections at the granularity of a residual boundary (deepseek-v4.md 4, T7).

Coefficients are fp32 throughout; streams are bfloat16 between sublayers.

Shape suffixes: R rows, S streams, D model width, X = S D, M mixing outputs (S * (S + 2)).
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.reference.wide import wide


def _mixed(streams_RSD: Tensor, fn_MX: Tensor, norm_eps: float) -> Tensor:
    flat = wide(streams_RSD).flatten(1)
    mean = (flat * flat).mean(1, keepdim=True)
    return (flat @ fn_MX.to(flat.dtype).t()) / torch.sqrt(mean + norm_eps)


def mhc_pre(
    streams_RSD: Tensor,
    fn_MX: Tensor,
    scale_3: Tensor,
    base_M: Tensor,
    *,
    iters: int,
    eps: float,
    norm_eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The sublayer's input [R, D] in the streams' type, post gates [R, S] and the mixing matrix
    [R, S (from), S (to)], both fp32.
    """
    n = streams_RSD.shape[1]
    mixed = _mixed(streams_RSD, fn_MX, norm_eps)
    scale, base = scale_3.to(mixed.dtype), base_M.to(mixed.dtype)
    pre = torch.sigmoid(mixed[:, :n] * scale[0] + base[:n]) + eps
    post = 2.0 * torch.sigmoid(mixed[:, n : 2 * n] * scale[1] + base[n : 2 * n])
    comb = (mixed[:, 2 * n :] * scale[2] + base[2 * n :]).view(-1, n, n)
    comb = torch.softmax(comb, 2) + eps
    comb = comb / (comb.sum(1, keepdim=True) + eps)
    for _ in range(iters - 1):
        comb = comb / (comb.sum(2, keepdim=True) + eps)
        comb = comb / (comb.sum(1, keepdim=True) + eps)
    x = (wide(streams_RSD) * pre[..., None]).sum(1)
    return x.to(streams_RSD.dtype), post, comb


def mhc_post(streams_RSD: Tensor, y_RD: Tensor, post_RS: Tensor, comb_RSS: Tensor) -> Tensor:
    """X'_k = post_k y + sum over j of comb[j, k] X_j: the sum runs over the FIRST index (4.2)."""
    streams = wide(streams_RSD)
    mixed = torch.einsum("rjk,rjd->rkd", comb_RSS.to(streams.dtype), streams)
    return (mixed + post_RS[..., None] * wide(y_RD)[:, None]).to(streams_RSD.dtype)


def mhc_boundary(
    streams_RSD: Tensor,
    y_RD: Tensor,
    post_RS: Tensor,
    comb_RSS: Tensor,
    fn_MX: Tensor,
    scale_3: Tensor,
    base_M: Tensor,
    *,
    iters: int,
    eps: float,
    norm_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`mhc_post` of one sublayer and `mhc_pre` of the next: new streams, input, gates, mixing."""
    streams = mhc_post(streams_RSD, y_RD, post_RS, comb_RSS)
    settings = {"eps": eps, "norm_eps": norm_eps}
    return streams, *mhc_pre(streams, fn_MX, scale_3, base_M, iters=iters, **settings)


def mhc_head(
    streams_RSD: Tensor,
    fn_SX: Tensor,
    scale_1: Tensor,
    base_S: Tensor,
    *,
    eps: float,
    norm_eps: float,
) -> Tensor:
    """Final collapse [R, D]: sigmoid gates only (4.4)."""
    mixed = _mixed(streams_RSD, fn_SX, norm_eps)
    pre = torch.sigmoid(mixed * scale_1 + base_S) + eps
    return (wide(streams_RSD) * pre[..., None]).sum(1).to(streams_RSD.dtype)
