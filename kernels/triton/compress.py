"""Token compressor, launched over completed windows; meaning in kernels/reference/compress.py.

An attention window is one program: a tile of slots x 512 channels, looped with an online softmax
for ratio 128. An index window has 128 channels only, so sixteen share a program, which gives the
Hadamard rotation a product to ride on.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.reference.pages import IndexPages, KvPages
from kernels.triton.hadamard import load_signs
from kernels.triton.launch import Case, launch, meta
from kernels.triton.norm_rope import turn
from kernels.triton.numerals import fp4_codes, rotate_signs
from kernels.triton.quantize_kv import store_kv

_SLOT_TILE = 16
_INDEX_WINDOWS = 16


@triton.jit
def slot_rows(
    raw, carry, ape, last, before, position, sequence, back, column, inside, ring, ratio,
    X: tl.constexpr, C: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """kv and score of the slots `back` tokens before the last (all arguments broadcast), and
    whether they are there. Biased once: the carry's scores hold the bias already.
    """
    at = position - back
    valid = (at >= 0) & inside
    fresh = back <= before
    # With overlap a window takes the first half of older slots, the second half of its own.
    half = tl.where(back < ratio, C, 0) if OVERLAP else 0
    channel = half + column
    row = (last - back).to(tl.int64)
    kept = (sequence.to(tl.int64) * ring + at % ring) * X
    pointer = tl.where(fresh, raw + row * X + channel, carry + kept + channel)
    kv = tl.load(pointer, mask=valid, other=0.0)
    score = tl.load(pointer + X // 2, mask=valid, other=-1e30)
    bias = tl.load(ape + (at % ratio) * (X // 2) + channel, mask=valid & fresh, other=0.0)
    return kv, score + bias, valid


@triton.jit
def finished(pooled, other, norm, cos, sin, window, eps, C: tl.constexpr, PAIRS: tl.constexpr):
    """Norm and RoPE of pooled rows [n, C]; `other` is the same with pairs swapped."""
    column = tl.arange(0, C)
    value = pooled.to(tl.bfloat16).to(tl.float32)
    other = other.to(tl.bfloat16).to(tl.float32)
    factor = (1.0 / tl.sqrt_rn(tl.sum(value * value, 1) / C + eps))[:, None]
    value = value * factor * tl.load(norm + column)[None, :]
    other = other * factor * tl.load(norm + (column ^ 1))[None, :]
    return turn(value, other, window, cos, sin, C, PAIRS, 1)


@triton.jit
def swapped(x, N: tl.constexpr, C: tl.constexpr):
    even, odd = tl.split(tl.reshape(x, (N, C // 2, 2)))
    return tl.reshape(tl.join(odd, even), (N, C))


@triton.jit
def _compress_kv(
    raw, carry, windows, ape, norm, cos, sin, slots, pages,
    ring, page_bytes, page_rows, eps: tl.float32,
    RATIO: tl.constexpr, SLOTS: tl.constexpr, TILE: tl.constexpr, X: tl.constexpr,
    C: tl.constexpr, NOPE: tl.constexpr, PAIRS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    window = tl.program_id(0)
    last = tl.load(windows + window * 4)
    if last < 0:
        return
    before = tl.load(windows + window * 4 + 1)
    position = tl.load(windows + window * 4 + 2)
    sequence = tl.load(windows + window * 4 + 3)
    column = tl.arange(0, C)
    top = tl.full([C], -1e30, tl.float32)
    total = tl.zeros([C], tl.float32)
    pooled = tl.zeros([C], tl.float32)
    for start in tl.range(0, SLOTS, TILE):
        back = SLOTS - 1 - start - tl.arange(0, TILE)
        kv, score, valid = slot_rows(
            raw, carry, ape, last, before, position, sequence, back[:, None], column[None, :],
            True, ring, RATIO, X, C, OVERLAP,
        )  # fmt: skip
        new = tl.maximum(top, tl.max(score, 0))
        weight = tl.where(valid, tl.exp(score - new[None, :]), 0.0)
        shrink = tl.exp(top - new)
        total = total * shrink + tl.sum(weight, 0)
        pooled = pooled * shrink + tl.sum(weight * kv, 0)
        top = new
    pooled = (pooled / total)[None, :]
    at = window + tl.arange(0, 1)
    value = finished(pooled, swapped(pooled, 1, C), norm, cos, sin, at, eps, C, PAIRS)
    store_kv(value, tl.load(slots + at), pages, page_bytes, page_rows, 1, C, NOPE)


@triton.jit
def _compress_index(
    raw, carry, windows, ape, norm, cos, sin, matrix, slots, pages,
    count, ring, page_bytes, page_rows, eps: tl.float32,
    RATIO: tl.constexpr, SLOTS: tl.constexpr, WINDOWS: tl.constexpr, X: tl.constexpr,
    C: tl.constexpr, PAIRS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    window = tl.program_id(0) * WINDOWS + tl.arange(0, WINDOWS)
    there = window < count
    last = tl.load(windows + window * 4, mask=there, other=-1)
    there = there & (last >= 0)
    before = tl.load(windows + window * 4 + 1, mask=there, other=0)
    position = tl.load(windows + window * 4 + 2, mask=there, other=0)
    sequence = tl.load(windows + window * 4 + 3, mask=there, other=0)
    column = tl.arange(0, C)
    top = tl.full([WINDOWS, C], -1e30, tl.float32)
    total = tl.zeros([WINDOWS, C], tl.float32)
    pooled = tl.zeros([WINDOWS, C], tl.float32)
    for slot in tl.range(0, SLOTS):
        back = tl.full([WINDOWS, 1], SLOTS - 1, tl.int32) - slot
        kv, score, valid = slot_rows(
            raw, carry, ape, last[:, None], before[:, None], position[:, None], sequence[:, None],
            back, column[None, :], there[:, None], ring, RATIO, X, C, OVERLAP,
        )  # fmt: skip
        new = tl.maximum(top, score)
        weight = tl.where(valid, tl.exp(score - new), 0.0)
        shrink = tl.exp(top - new)
        total = total * shrink + weight
        pooled = pooled * shrink + weight * kv
        top = new
    pooled = pooled / tl.where(there[:, None], total, 1.0)
    other = swapped(pooled, WINDOWS, C)
    at = tl.minimum(window, count - 1)
    value = finished(pooled, other, norm, cos, sin, at, eps, C, PAIRS)
    code, exponent = fp4_codes(rotate_signs(value, load_signs(matrix, C), C), WINDOWS, C)
    slot = tl.load(slots + window, mask=there, other=-1)
    wanted = (slot >= 0)[:, None]
    page = pages + (slot // page_rows).to(tl.int64) * page_bytes
    place = slot % page_rows
    low, high = tl.split(tl.reshape(code, (WINDOWS, C // 2, 2)))
    data = (page + place * (C // 2))[:, None] + tl.arange(0, C // 2)[None, :]
    tl.store(data, (low | (high << 4)).to(tl.uint8), mask=wanted)
    scale = (page + page_rows * (C // 2) + place * (C // 32))[:, None]
    tl.store(scale + tl.arange(0, C // 32)[None, :], (exponent + 127).to(tl.uint8), mask=wanted)


@triton.jit
def _keep_carry(
    raw, carry, spans, ape, ring, ratio, channels, X: tl.constexpr, BLOCK: tl.constexpr
):
    span, slot = spans + tl.program_id(0) * 4, tl.program_id(1)
    first = tl.load(span)
    count = tl.load(span + 1)
    start = tl.load(span + 2)
    sequence = tl.load(span + 3)
    end = start + count
    # The newest position of this span that falls on the slot, if there is one.
    newest = end - 1 - (end - 1 - slot + ring) % ring
    if newest < start:
        return
    column = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    inside = column < channels
    row = (first + newest - start).to(tl.int64)
    value = tl.load(raw + row * X + column, mask=inside)
    score = inside & (column >= X // 2)
    bias = ape + (newest % ratio) * (X // 2) + column - X // 2
    value += tl.load(bias, mask=score, other=0.0)
    out = carry + (sequence.to(tl.int64) * ring + slot) * X
    tl.store(out + column, value, mask=inside)


def compress_kv(
    raw_TX: Tensor,
    carry_NSX: Tensor,
    windows_B4: Tensor,
    ape_SA: Tensor,
    norm_C: Tensor,
    cos_BP: Tensor,
    sin_BP: Tensor,
    slots_B: Tensor,
    pages_PB: Tensor,
    layout: KvPages,
    *,
    eps: float,
) -> None:
    ratio, overlap = ape_SA.shape[0], ape_SA.shape[1] == 2 * layout.dim
    slots = 2 * ratio if overlap else ratio
    launch(
        _compress_kv, (windows_B4.shape[0],),
        raw_TX, carry_NSX, windows_B4, ape_SA, norm_C, cos_BP, sin_BP, slots_B, pages_PB,
        carry_NSX.shape[1], pages_PB.stride(0), layout.page_rows, eps,
        RATIO=ratio, SLOTS=slots, TILE=min(slots, _SLOT_TILE), X=raw_TX.shape[1], C=layout.dim,
        NOPE=layout.nope, PAIRS=cos_BP.shape[1], OVERLAP=overlap, num_warps=4 if overlap else 8,
    )  # fmt: skip


def compress_index(
    raw_TX: Tensor,
    carry_NSX: Tensor,
    windows_B4: Tensor,
    ape_SA: Tensor,
    norm_C: Tensor,
    cos_BP: Tensor,
    sin_BP: Tensor,
    matrix_CC: Tensor,
    slots_B: Tensor,
    pages_PB: Tensor,
    layout: IndexPages,
    *,
    eps: float,
) -> None:
    ratio, overlap = ape_SA.shape[0], ape_SA.shape[1] == 2 * layout.dim
    count = windows_B4.shape[0]
    launch(
        _compress_index, (triton.cdiv(count, _INDEX_WINDOWS),),
        raw_TX, carry_NSX, windows_B4, ape_SA, norm_C, cos_BP, sin_BP, matrix_CC, slots_B,
        pages_PB, count, carry_NSX.shape[1], pages_PB.stride(0), layout.page_rows, eps,
        RATIO=ratio, SLOTS=2 * ratio if overlap else ratio, WINDOWS=_INDEX_WINDOWS,
        X=raw_TX.shape[1], C=layout.dim, PAIRS=cos_BP.shape[1], OVERLAP=overlap, num_warps=4,
    )  # fmt: skip


def keep_carry(raw_TX: Tensor, carry_NSX: Tensor, spans_B4: Tensor, ape_SA: Tensor) -> None:
    _, ring, channels = carry_NSX.shape
    block = 1024
    launch(
        _keep_carry, (spans_B4.shape[0], ring, triton.cdiv(channels, block)),
        raw_TX, carry_NSX, spans_B4, ape_SA, ring, ape_SA.shape[0], channels,
        X=channels, BLOCK=block, num_warps=4,
    )  # fmt: skip


def _f32(*shape: int) -> Tensor:
    return meta(*shape, dtype=torch.float32)


def _i32(*shape: int) -> Tensor:
    return meta(*shape, dtype=torch.int32)


def _kv_case(ratio: int, halves: int, ring: int, layout: KvPages) -> None:
    compress_kv(
        _f32(8192, 2 * halves * 512), _f32(1, ring, 2 * halves * 512),
        _i32(8192 // ratio, 4), _f32(ratio, halves * 512), _f32(512),
        _f32(8192 // ratio, 32), _f32(8192 // ratio, 32), _i32(8192 // ratio),
        meta(64, layout.page_bytes, dtype=torch.uint8), layout, eps=1e-6,
    )  # fmt: skip


def _index_case() -> None:
    layout = IndexPages(page_rows=64, dim=128)
    compress_index(
        _f32(8192, 512), _f32(1, 8, 512), _i32(2048, 4), _f32(4, 256), _f32(128),
        _f32(2048, 32), _f32(2048, 32), _f32(128, 128), _i32(2048),
        meta(64, layout.page_bytes, dtype=torch.uint8), layout, eps=1e-6,
    )  # fmt: skip


CASES = (
    Case("compress_kv, ratio 4", lambda: _kv_case(4, 2, 8, KvPages(64, 512, 448))),
    Case("compress_kv, ratio 128", lambda: _kv_case(128, 1, 128, KvPages(2, 512, 448))),
    Case("compress_index, ratio 4", _index_case, {"_compress_index": "mma"}),
    Case(
        "keep_carry, ratio 4",
        lambda: keep_carry(_f32(8192, 2048), _f32(16, 8, 2048), _i32(16, 4), _f32(4, 1024)),
    ),
)
