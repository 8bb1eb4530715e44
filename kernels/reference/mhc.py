"""Manifold-constrained hyper-connections (deepseek-v4.md 4, T7). Coefficients are fp32 throughout.

Shape suffixes: R rows, S streams, D model width, M mixing outputs (S * (S + 2)).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kernels.reference.lanes import exp, sigmoid
from kernels.reference.norm import rms_norm


@dataclass(frozen=True)
class HyperWeights:
    """fp32 tensors of one instance and its constants; `fn` in the form that its ops take."""

    fn: Tensor
    base: Tensor
    scale: Tensor
    streams: int
    iters: int
    eps: float
    norm_eps: float

    def packed(self, fn: Tensor) -> HyperWeights:
        return replace(self, fn=fn)


def mixing(streams_RSD: Tensor, fn_MX: Tensor, *, norm_eps: float) -> Tensor:
    """[R, M]: projection of the flattened streams, RMS-normalised afterwards (4.1)."""
    flat = streams_RSD.reshape(streams_RSD.shape[0], -1).float()
    mean = (flat * flat).sum(-1, keepdim=True) / flat.shape[-1]
    return torch.nn.functional.linear(flat, fn_MX) * (1.0 / torch.sqrt(mean + norm_eps))


def input_gates(
    mixed_RM: Tensor, scale_3: Tensor, base_M: Tensor, *, streams: int, eps: float
) -> Tensor:
    """pre [S, R]: the weight of each stream in the sublayer's input."""
    planes = mixed_RM[:, :streams].t().contiguous()
    return sigmoid(planes * scale_3[0] + base_M[:streams, None]) + eps


def output_gates(
    mixed_RM: Tensor, scale_3: Tensor, base_M: Tensor, *, streams: int, iters: int, eps: float
) -> tuple[Tensor, Tensor]:
    """post [S, R] (no eps) and comb [S (from), S (to), R]."""
    n, rows = streams, mixed_RM.shape[0]
    planes = mixed_RM[:, n:].t().contiguous()
    post = 2.0 * sigmoid(planes[:n] * scale_3[1] + base_M[n : 2 * n, None])
    comb = (planes[n:] * scale_3[2] + base_M[2 * n :, None]).view(n, n, rows)
    return post, sinkhorn(comb, iters=iters, eps=eps)


def _sum_in_order(planes: Tensor, dim: int) -> Tensor:
    total = planes.select(dim, 0) + planes.select(dim, 1)
    for index in range(2, planes.shape[dim]):
        total += planes.select(dim, index)
    return total


def sinkhorn(comb_SSR: Tensor, *, iters: int, eps: float) -> Tensor:
    """Softmax over the second index, then alternating column and row normalisation, columns
    last.
    """
    comb = exp(comb_SSR - comb_SSR.amax(1, keepdim=True))
    comb = comb / _sum_in_order(comb, 1)[:, None] + eps
    comb = comb / (_sum_in_order(comb, 0) + eps)
    if comb.is_cpu and not comb.requires_grad:
        _alternate_in_numpy(comb.numpy(), iters=iters, eps=eps)
        return comb
    for _ in range(iters - 1):
        comb = comb / (_sum_in_order(comb, 1) + eps)[:, None]
        comb = comb / (_sum_in_order(comb, 0) + eps)
    return comb


def _alternate_in_numpy(comb_SSR: npt.NDArray[np.float32], *, iters: int, eps: float) -> None:
    """The same additions and divisions, in place; a tiny op costs numpy a fifth of torch's time."""
    n, small = comb_SSR.shape[0], np.float32(eps)
    total = np.empty_like(comb_SSR[0])
    by_row = [comb_SSR[:, k] for k in range(n)]
    by_column = [comb_SSR[j] for j in range(n)]
    for _ in range(iters - 1):
        for planes, divided in ((by_row, total[:, None]), (by_column, total)):
            np.add(planes[0], planes[1], out=total)
            for plane in planes[2:]:
                np.add(total, plane, out=total)
            np.add(total, small, out=total)
            np.divide(comb_SSR, divided, out=comb_SSR)


def collapse(streams_RSD: Tensor, pre_SR: Tensor) -> Tensor:
    """[R, D] = sum over streams of pre * stream, fp32, in stream order."""
    total = streams_RSD[:, 0].float() * pre_SR[0][:, None]
    for stream in range(1, pre_SR.shape[0]):
        total += streams_RSD[:, stream].float() * pre_SR[stream][:, None]
    return total


def expand(streams_RSD: Tensor, y_RD: Tensor, post_SR: Tensor, comb_SSR: Tensor) -> Tensor:
    """X'_k = post_k y + sum over j of comb[j, k] X_j: the sum runs over the FIRST index (4.2)."""
    mixed = torch.bmm(comb_SSR.permute(2, 1, 0).contiguous(), streams_RSD.float())
    mixed += post_SR.t()[:, :, None] * y_RD.float()[:, None, :]
    return mixed.to(streams_RSD.dtype)


def head_collapse(
    streams_RSD: Tensor,
    fn_SX: Tensor,
    scale_1: Tensor,
    base_S: Tensor,
    *,
    norm_eps: float,
    eps: float,
) -> Tensor:
    """Final collapse: sigmoid gates only, no Sinkhorn (4.4)."""
    mixed = mixing(streams_RSD, fn_SX, norm_eps=norm_eps).t().contiguous()
    return collapse(streams_RSD, sigmoid(mixed * scale_1 + base_S[:, None]) + eps)


def prepare(gates: HyperWeights) -> HyperWeights:
    return gates


def prepare_head(fn_SX: Tensor) -> Tensor:
    return fn_SX


def enter(
    streams_RSD: Tensor, gates: HyperWeights, norm_D: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Into a sublayer: its normed input [R, D], and what `leave` needs of each row (4.1, 4.2)."""
    g = gates
    mixed = mixing(streams_RSD, g.fn, norm_eps=g.norm_eps)
    pre = input_gates(mixed, g.scale, g.base, streams=g.streams, eps=g.eps)
    x = collapse(streams_RSD, pre).to(streams_RSD.dtype)
    return rms_norm(x, norm_D, eps=g.norm_eps).to(streams_RSD.dtype), (mixed,)


def leave(
    streams_RSD: Tensor,
    gates: HyperWeights,
    mixed: tuple[Tensor, ...],
    y_RD: Tensor,
    *,
    in_place: bool = False,
) -> Tensor:
    """Out of a sublayer: the streams with its output y. `in_place`: they may be written over."""
    g = gates
    post, comb = output_gates(
        mixed[0], g.scale, g.base, streams=g.streams, iters=g.iters, eps=g.eps
    )
    return expand(streams_RSD, y_RD.to(streams_RSD.dtype), post, comb)
