"""Attention of generated tokens over the paged FP8 cache; meaning in
kernels/reference/decode_attention.py.

A unit of work is a token, up to 32 heads, a chunk of keys and one half of the value channels:
scores are computed for both halves, so that an accumulator has 256 columns and decoding e4m3 rows
in registers spills nothing. Tiles of 64 heads, which a Hopper tensor-core instruction would want,
spill in every form tried. Both caches are walked in one loop; `combine` joins the chunks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.reference.pages import KvPages
from kernels.reference.sparse_attention import CHUNK
from kernels.triton.combine import Parts, combine
from kernels.triton.launch import Case, launch, meta
from kernels.triton.numerals import power_of_two
from kernels.triton.softmax import LOG2_E, fold
from kernels.triton.sparse_attention import tile_heads as fitting_heads

_BLOCK_K = 64


@triton.jit
def nope_rows(
    page, row, page_rows, FIRST: tl.constexpr, WIDTH: tl.constexpr, DATA: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """e4m3 channels FIRST to FIRST + WIDTH (at most 256) of the rows of their pages, in DTYPE."""
    scales = tl.load((page + page_rows * DATA + row * 8).to(tl.pointer_type(tl.int64)))
    # At most four scales are needed: 32 bits are half of the registers.
    word = (scales >> (FIRST // 64 * 8)).to(tl.int32)
    shift = tl.arange(0, WIDTH) // 64 * 8
    exponent = ((word[:, None] >> shift[None, :]) & 255) - 127
    code = tl.load((page + row * DATA + FIRST)[:, None] + tl.arange(0, WIDTH)[None, :])
    code = code.to(tl.float8e4nv, bitcast=True)
    if tl.float16 == DTYPE:
        # A code and its scale multiply in one instruction; 2^15 is the largest power.
        return code.to(tl.float16) * power_of_two(tl.minimum(exponent, 15)).to(tl.float16)
    return (code.to(tl.float32) * power_of_two(exponent)).to(DTYPE)


@triton.jit
def rope_rows(
    page, row, NOPE: tl.constexpr, WIDTH: tl.constexpr, DATA: tl.constexpr, DTYPE: tl.constexpr
):
    start = (page + row * DATA + NOPE).to(tl.pointer_type(tl.bfloat16))
    return tl.load(start[:, None] + tl.arange(0, WIDTH)[None, :]).to(tl.float32).to(DTYPE)


@triton.jit
def walk(
    q, own_list, heavy_list, window, entries, window_bytes, entry_bytes,
    window_rows, entry_rows, own, begin, end, scale, inside, total_out, top_out, norm_out,
    UPPER: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, D: tl.constexpr,
    NOPE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Fold tiles begin to end of the joint list, of which the first `own` are the window's, and
    store one half of the value channels. q and total_out are pointers to each head's channels.

    448 is no power of two: channels are taken as 256 + 128 + 64 e4m3 and 64 bfloat16, in order.
    """
    HALF: tl.constexpr = D // 2
    DATA: tl.constexpr = 2 * D - NOPE
    B: tl.constexpr = (NOPE - HALF) // 128 * 128
    C: tl.constexpr = (NOPE - HALF) % 128
    ROPE: tl.constexpr = D - NOPE
    low_column = tl.arange(0, HALF)[None, :]
    rope_column = NOPE + tl.arange(0, ROPE)[None, :]
    query_a = tl.load(q[:, None] + low_column, mask=inside[:, None], other=0.0)
    query_r = tl.load(q[:, None] + rope_column, mask=inside[:, None], other=0.0)
    if B > 0:
        b_column = HALF + tl.arange(0, B)[None, :]
        query_b = tl.load(q[:, None] + b_column, mask=inside[:, None], other=0.0)
        total_b = tl.zeros([BLOCK_H, B], tl.float32)
    if C > 0:
        c_column = HALF + B + tl.arange(0, C)[None, :]
        query_c = tl.load(q[:, None] + c_column, mask=inside[:, None], other=0.0)
        total_c = tl.zeros([BLOCK_H, C], tl.float32)
    if UPPER:
        total_r = tl.zeros([BLOCK_H, ROPE], tl.float32)
    else:
        total_a = tl.zeros([BLOCK_H, HALF], tl.float32)
    top = tl.full([BLOCK_H], -1e30, tl.float32)
    norm = tl.zeros([BLOCK_H], tl.float32)
    key = tl.arange(0, BLOCK_K)
    for tile in tl.range(begin, end):
        in_window = tile < own
        which = tl.where(in_window, own_list + tile * BLOCK_K, heavy_list + (tile - own) * BLOCK_K)
        slot = tl.load(which + key)
        page_rows = tl.where(in_window, window_rows, entry_rows)
        page_bytes = tl.where(in_window, window_bytes, entry_bytes)
        place = tl.maximum(slot, 0)
        page = tl.where(in_window, window, entries) + (place // page_rows).to(tl.int64) * page_bytes
        row = place % page_rows
        rows_a = nope_rows(page, row, page_rows, 0, HALF, DATA, DTYPE)
        score = tl.dot(query_a, tl.trans(rows_a))
        if B > 0:
            rows_b = nope_rows(page, row, page_rows, HALF, B, DATA, DTYPE)
            score = tl.dot(query_b, tl.trans(rows_b), score)
        if C > 0:
            rows_c = nope_rows(page, row, page_rows, HALF + B, C, DATA, DTYPE)
            score = tl.dot(query_c, tl.trans(rows_c), score)
        rows_r = rope_rows(page, row, NOPE, ROPE, DATA, DTYPE)
        score = tl.dot(query_r, tl.trans(rows_r), score) * scale
        score = tl.where((slot >= 0)[None, :], score, float("-inf"))
        weight, top, norm, keep = fold(score, top, norm)
        share = weight.to(DTYPE)
        if UPPER:
            if B > 0:
                total_b = tl.dot(share, rows_b, total_b * keep[:, None])
            if C > 0:
                total_c = tl.dot(share, rows_c, total_c * keep[:, None])
            total_r = tl.dot(share, rows_r, total_r * keep[:, None])
        else:
            total_a = tl.dot(share, rows_a, total_a * keep[:, None])
    wanted = (inside & (norm > 0.0))[:, None]
    if UPPER:
        if B > 0:
            tl.store(total_out[:, None] + b_column, total_b, mask=wanted)
        if C > 0:
            tl.store(total_out[:, None] + c_column, total_c, mask=wanted)
        tl.store(total_out[:, None] + rope_column, total_r, mask=wanted)
    else:
        tl.store(total_out[:, None] + low_column, total_a, mask=wanted)
        tl.store(top_out, top, mask=inside)
        tl.store(norm_out, norm, mask=inside)


@triton.jit
def _decode_attention(
    q, window, window_slots, entries, entry_slots, total_out, top_out, norm_out,
    heads, own_slots, heavy_slots, window_bytes, window_rows, entry_bytes, entry_rows,
    chunk, chunks, scale: tl.float32,
    SCAN: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, D: tl.constexpr,
    NOPE: tl.constexpr,
):  # fmt: skip
    groups = tl.cdiv(heads, BLOCK_H)
    token = (tl.program_id(0) // groups).to(tl.int64)
    head = tl.program_id(0) % groups * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = head < heads
    own_list = window_slots + token * own_slots
    heavy_list = entry_slots + token * heavy_slots
    own = own_slots // BLOCK_K
    begin = tl.program_id(2) * chunk // BLOCK_K
    # Lists are as wide as their bucket; tiles after the last key are not walked.
    scan = tl.program_id(2) * chunk + tl.arange(0, SCAN)
    there = (tl.arange(0, SCAN) < chunk) & (scan < own_slots + heavy_slots)
    mine = scan < own_slots
    slot = tl.load(own_list + scan, mask=there & mine, other=-1)
    slot = tl.maximum(slot, tl.load(heavy_list + scan - own_slots, mask=there & ~mine, other=-1))
    end = tl.cdiv(tl.max(tl.where(slot >= 0, scan + 1, 0), 0), BLOCK_K)
    line = token * heads + head
    part = line * chunks + tl.program_id(2)
    if tl.program_id(1) == 0:
        walk(
            q + line * D, own_list, heavy_list, window, entries, window_bytes, entry_bytes,
            window_rows, entry_rows, own, begin, end, scale, inside,
            total_out + part * D, top_out + part, norm_out + part,
            False, BLOCK_H, BLOCK_K, D, NOPE, q.dtype.element_ty,
        )  # fmt: skip
    else:
        walk(
            q + line * D, own_list, heavy_list, window, entries, window_bytes, entry_bytes,
            window_rows, entry_rows, own, begin, end, scale, inside,
            total_out + part * D, top_out + part, norm_out + part,
            True, BLOCK_H, BLOCK_K, D, NOPE, q.dtype.element_ty,
        )  # fmt: skip


def decode_attention(
    q_RHC: Tensor,
    window_PB: Tensor,
    window_slots_RW: Tensor,
    window_layout: KvPages,
    entries_PB: Tensor,
    entry_slots_RK: Tensor,
    entry_layout: KvPages,
    sink_H: Tensor,
    cos_RP: Tensor,
    sin_RP: Tensor,
    *,
    scale: float,
    chunk: int = CHUNK,
    tile_heads: int | None = None,
) -> Tensor:
    rows, heads, channels = q_RHC.shape
    own, heavy = window_slots_RW.shape[1], entry_slots_RK.shape[1]
    if chunk % _BLOCK_K or own % _BLOCK_K or heavy % _BLOCK_K:
        raise ValueError(
            f"chunk is {chunk} and the lists are {own} and {heavy} slots wide; all must be "
            f"multiples of {_BLOCK_K}"
        )
    if (window_layout.dim, window_layout.nope) != (entry_layout.dim, entry_layout.nope):
        raise ValueError("both caches must have rows of one format")
    half, nope = channels // 2, window_layout.nope
    above = nope - half
    pieces = (half, above // 128 * 128, above % 128, channels - nope)
    if above < 0 or any(piece & (piece - 1) for piece in pieces):
        raise ValueError(
            f"rows of {nope} e4m3 of {channels} channels are cut into tiles of {pieces}; each must "
            "be 0 or a power of two"
        )
    block_h = tile_heads or min(32, fitting_heads(heads))
    if block_h not in (16, 32):
        raise ValueError(f"tile_heads is {tile_heads}; it must be 16 or 32")
    chunks = max(triton.cdiv(own + heavy, chunk), 1)
    parts = Parts.empty(q_RHC, chunks)
    launch(
        _decode_attention, (triton.cdiv(heads, block_h) * rows, 2, chunks),
        q_RHC, window_PB, window_slots_RW, entries_PB, entry_slots_RK,
        parts.total, parts.top, parts.norm, heads, own, heavy,
        window_PB.stride(0), window_layout.page_rows,
        entries_PB.stride(0), entry_layout.page_rows, chunk, chunks, scale * LOG2_E,
        SCAN=triton.next_power_of_2(chunk), BLOCK_H=block_h, BLOCK_K=_BLOCK_K,
        D=channels, NOPE=window_layout.nope,
        num_warps=8, num_stages=2,
    )  # fmt: skip
    return combine(parts, sink_H, cos_RP, sin_RP, dtype=q_RHC.dtype)


def _case(name: str, heads: int, slots: int, page_rows: int, units: str, **kind: int) -> Case:
    window = KvPages(page_rows=256, dim=512, nope=448)
    entry = KvPages(page_rows=page_rows, dim=512, nope=448)
    fp32 = torch.float32
    rows = 32
    return Case(
        f"decode_attention, {name}",
        lambda: decode_attention(
            meta(rows, heads, 512, dtype=torch.float16),
            meta(1024, window.page_bytes, dtype=torch.uint8),
            meta(rows, 128, dtype=torch.int32),
            window,
            meta(65536, entry.page_bytes, dtype=torch.uint8),
            meta(rows, slots, dtype=torch.int32),
            entry,
            meta(heads, dtype=fp32),
            meta(rows, 32, dtype=fp32),
            meta(rows, 32, dtype=fp32),
            scale=512**-0.5,
            **kind,
        ),
        {"_decode_attention": units},
    )


CASES = (
    _case("Flash CSA", 64, 512, 64, "mma"),
    _case("Pro CSA", 128, 1024, 64, "mma"),
    _case("Flash HCA at a million", 64, 8192, 2, "mma"),
    _case("Flash CSA, few tokens", 64, 512, 64, "mma", chunk=128),
    _case("32 heads of a rank", 32, 1024, 64, "mma"),
    _case("16 heads of a rank", 16, 1024, 64, "mma"),
    _case("16 heads of a rank, HCA", 16, 8192, 2, "mma", tile_heads=32),
    _case("8 heads of a rank", 8, 512, 64, "mma"),
)
