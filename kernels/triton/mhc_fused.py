"""Hyper-connections in two launches a boundary; meaning in kernels/reference/mhc_fused.py.

The first launch updates the streams and projects them (fp32 accuracy from three bfloat16 products:
the streams are bfloat16 already, so only the weight is split), over a number of column ranges that
the model width fixes. The second adds the ranges in order, makes the gates and collapses.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.launch import BATCH_SIZES, Case, launch, meta
from kernels.triton.numerals import split3

_TOKENS = 16
_RANGE = 256
_STEP = 64
_OUTPUTS = 32
"""Columns of the partial sums: at most 24 mixing outputs, the sum of squares in the last."""
_GATE_TOKENS = 8
_GATE_COLUMNS = 512


@triton.jit(do_not_specialize=BATCH_SIZES)
def _project(
    streams, y, post, comb, new, fn, partial, rows, width,
    TOKENS: tl.constexpr, RANGE: tl.constexpr, STEP: tl.constexpr, S: tl.constexpr,
    M: tl.constexpr, OUTPUTS: tl.constexpr, UPDATE: tl.constexpr, PROJECT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    real = row < rows
    start = row.to(tl.int64)[:, None] * width
    output = tl.arange(0, OUTPUTS)
    total = tl.zeros([TOKENS, OUTPUTS], tl.float32)
    square = tl.zeros([TOKENS], tl.float32)
    for step in tl.range(0, RANGE, STEP):
        column = tl.program_id(1) * RANGE + step + tl.arange(0, STEP)
        inside = real[:, None] & (column < width)[None, :]
        for k in tl.static_range(S):
            if UPDATE:
                value = tl.load(y + start + column[None, :], mask=inside, other=0.0)
                gate = tl.load(post + row * S + k, mask=real, other=0.0)
                value = value.to(tl.float32) * gate[:, None]
                for j in tl.static_range(S):
                    old = streams + start * S + j * width + column[None, :]
                    share = tl.load(comb + row * (S * S) + j * S + k, mask=real, other=0.0)
                    value += tl.load(old, mask=inside, other=0.0).to(tl.float32) * share[:, None]
                x = value.to(new.dtype.element_ty)
                tl.store(new + start * S + k * width + column[None, :], x, mask=inside)
            else:
                at = streams + start * S + k * width + column[None, :]
                x = tl.load(at, mask=inside, other=0.0)
            if PROJECT:
                weight = fn + output[None, :].to(tl.int64) * (S * width) + k * width
                known = (output < M)[None, :] & (column < width)[:, None]
                w = tl.load(weight + column[:, None], mask=known, other=0.0)
                high, mid, low = split3(w)
                total = tl.dot(x, low, total)
                total = tl.dot(x, mid, total)
                total = tl.dot(x, high, total)
                wide = x.to(tl.float32)
                square += tl.sum(wide * wide, 1)
    if PROJECT:
        total = tl.where((output == OUTPUTS - 1)[None, :], square[:, None], total)
        at = (tl.program_id(1) * rows + row)[:, None] * OUTPUTS + output[None, :]
        tl.store(partial + at, total, mask=real[:, None])


@triton.jit(do_not_specialize=BATCH_SIZES)
def _collapse(
    streams, partial, scale, base, x, post, comb, rows, width, ranges, inverse,
    eps: tl.float32, norm_eps: tl.float32,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr, S: tl.constexpr, OUTPUTS: tl.constexpr,
    ITERS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    real = row < rows
    output = tl.arange(0, OUTPUTS)
    mixed = tl.zeros([TOKENS, OUTPUTS], tl.float32)
    for part in tl.range(0, ranges):
        at = (part * rows + row)[:, None] * OUTPUTS + output[None, :]
        mixed += tl.load(partial + at, mask=real[:, None], other=0.0)
    square = tl.sum(tl.where((output == OUTPUTS - 1)[None, :], mixed, 0.0), 1)
    factor = 1.0 / tl.sqrt_rn(square * inverse + norm_eps)
    mixed = mixed * factor[:, None]
    gate = mixed * tl.load(scale) + tl.load(base + output, mask=output < S, other=0.0)[None, :]
    pre = 1.0 / (1.0 + tl.exp(-gate)) + eps
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = real[:, None] & (column < width)[None, :]
    start = row.to(tl.int64)[:, None] * width
    total = tl.zeros([TOKENS, COLUMNS], tl.float32)
    for k in tl.static_range(S):
        value = tl.load(streams + start * S + k * width + column[None, :], mask=inside, other=0.0)
        share = tl.sum(tl.where((output == k)[None, :], pre, 0.0), 1)
        total += value.to(tl.float32) * share[:, None]
    tl.store(x + start + column[None, :], total.to(x.dtype.element_ty), mask=inside)
    if ITERS > 0 and tl.program_id(1) == 0:
        two = (output >= S) & (output < 2 * S)
        bias = tl.load(base + output, mask=two, other=0.0)[None, :]
        gates = 2.0 / (1.0 + tl.exp(-(mixed * tl.load(scale + 1) + bias)))
        place = row[:, None] * S + (output - S)[None, :]
        tl.store(post + place, gates, mask=real[:, None] & two[None, :])
        # The mixing logits lie behind the gates: read them again as a tile of their own.
        cell = tl.arange(0, S * S)
        logits = tl.zeros([TOKENS, S * S], tl.float32)
        for part in tl.range(0, ranges):
            first = (part * rows + row)[:, None] * OUTPUTS + 2 * S
            logits += tl.load(partial + first + cell[None, :], mask=real[:, None], other=0.0)
        logits = logits * factor[:, None] * tl.load(scale + 2)
        logits += tl.load(base + 2 * S + cell)[None, :]
        mix = sinkhorn(tl.reshape(logits, (TOKENS, S, S)), eps, ITERS)
        place = row[:, None] * (S * S) + cell[None, :]
        tl.store(comb + place, tl.reshape(mix, (TOKENS, S * S)), mask=real[:, None])


@triton.jit
def sinkhorn(mix, eps, ITERS: tl.constexpr):
    """Softmax over the second index, then columns and rows in turn, columns last (4.1)."""
    mix = tl.exp(mix - tl.max(mix, 2)[:, :, None])
    mix = mix / tl.sum(mix, 2)[:, :, None] + eps
    mix = mix / (tl.sum(mix, 1) + eps)[:, None, :]
    for _ in tl.range(1, ITERS):
        mix = mix / (tl.sum(mix, 2) + eps)[:, :, None]
        mix = mix / (tl.sum(mix, 1) + eps)[:, None, :]
    return mix


def _streams_of(streams_RSD: Tensor, fn: Tensor | None) -> tuple[int, int, int]:
    rows, streams, width = streams_RSD.shape
    outputs = 0 if fn is None else fn.shape[0]
    if streams & (streams - 1) or outputs >= _OUTPUTS:
        raise ValueError(
            f"hyper-connections of {streams} streams are not compiled in: the Triton kernels take "
            "2 or 4; use the reference backend"
        )
    return rows, streams, width


def _first(
    streams_RSD: Tensor,
    update: tuple[Tensor, Tensor, Tensor] | None,
    fn: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """New streams (the old ones without `update`) and partial sums (none without `fn`)."""
    rows, streams, width = _streams_of(streams_RSD, fn)
    old = streams_RSD.contiguous()
    y, post, comb = update if update is not None else (None, None, None)
    new = torch.empty_like(old) if update is not None else None
    ranges = triton.cdiv(width, _RANGE)
    partial = None
    if fn is not None:
        shape = (ranges, rows, _OUTPUTS)
        partial = torch.empty(shape, dtype=torch.float32, device=old.device)
    launch(
        _project, (triton.cdiv(rows, _TOKENS), ranges),
        old, y, post, comb, new, fn, partial, rows, width,
        TOKENS=_TOKENS, RANGE=_RANGE, STEP=_STEP, S=streams, M=0 if fn is None else fn.shape[0],
        OUTPUTS=_OUTPUTS, UPDATE=update is not None, PROJECT=fn is not None,
        num_warps=4, num_stages=2,
    )  # fmt: skip
    return old if new is None else new, partial


def _second(
    streams_RSD: Tensor,
    partial: Tensor,
    scale: Tensor,
    base: Tensor,
    *,
    iters: int,
    eps: float,
    norm_eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, streams, width = streams_RSD.shape
    device = streams_RSD.device
    x = torch.empty((rows, width), dtype=streams_RSD.dtype, device=device)
    post = torch.empty((rows, streams), dtype=torch.float32, device=device)
    comb = torch.empty((rows, streams, streams), dtype=torch.float32, device=device)
    launch(
        _collapse, (triton.cdiv(rows, _GATE_TOKENS), triton.cdiv(width, _GATE_COLUMNS)),
        streams_RSD, partial, scale, base, x, post, comb,
        rows, width, partial.shape[0], 1.0 / (streams * width), eps, norm_eps,
        TOKENS=_GATE_TOKENS, COLUMNS=_GATE_COLUMNS, S=streams, OUTPUTS=_OUTPUTS, ITERS=iters,
        num_warps=4, num_stages=2,
    )  # fmt: skip
    return x, post, comb


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
    streams, partial = _first(streams_RSD, None, fn_MX)
    assert partial is not None
    return _second(streams, partial, scale_3, base_M, iters=iters, eps=eps, norm_eps=norm_eps)


def mhc_post(streams_RSD: Tensor, y_RD: Tensor, post_RS: Tensor, comb_RSS: Tensor) -> Tensor:
    return _first(streams_RSD, (y_RD, post_RS, comb_RSS), None)[0]


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
    streams, partial = _first(streams_RSD, (y_RD, post_RS, comb_RSS), fn_MX)
    assert partial is not None
    pre = _second(streams, partial, scale_3, base_M, iters=iters, eps=eps, norm_eps=norm_eps)
    return streams, *pre


def mhc_head(
    streams_RSD: Tensor,
    fn_SX: Tensor,
    scale_1: Tensor,
    base_S: Tensor,
    *,
    eps: float,
    norm_eps: float,
) -> Tensor:
    streams, partial = _first(streams_RSD, None, fn_SX)
    assert partial is not None
    return _second(streams, partial, scale_1, base_S, iters=0, eps=eps, norm_eps=norm_eps)[0]


def _f32(*shape: int) -> Tensor:
    return meta(*shape, dtype=torch.float32)


def _boundary(width: int) -> None:
    mhc_boundary(
        meta(4096, 4, width), meta(4096, width), _f32(4096, 4), _f32(4096, 4, 4),
        _f32(24, 4 * width), _f32(3), _f32(24), iters=20, eps=1e-6, norm_eps=1e-6,
    )  # fmt: skip


def _pre(width: int) -> None:
    mhc_pre(
        meta(4096, 4, width), _f32(24, 4 * width), _f32(3), _f32(24),
        iters=20, eps=1e-6, norm_eps=1e-6,
    )  # fmt: skip


def _head(width: int) -> None:
    mhc_head(meta(64, 4, width), _f32(4, 4 * width), _f32(1), _f32(4), eps=1e-6, norm_eps=1e-6)


CASES = (
    Case("mhc_boundary, 4096", lambda: _boundary(4096), {"_project": "mma"}),
    Case("mhc_boundary, 7168", lambda: _boundary(7168), {"_project": "mma"}),
    Case("mhc_pre, 4096", lambda: _pre(4096), {"_project": "mma"}),
    Case(
        "mhc_post, 4096",
        lambda: mhc_post(meta(4096, 4, 4096), meta(4096, 4096), _f32(4096, 4), _f32(4096, 4, 4)),
    ),
    Case("mhc_head, 4096", lambda: _head(4096), {"_project": "mma"}),
)
