"""Joins the chunks of long key lists: the softmax of all keys from those of each chunk.

A chunk leaves its maximum, its sum of weights and its weighted rows, in fp32 and undivided. Chunks
are joined in order; one without keys has sum 0, is not read and changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.launch import Case, launch, meta
from kernels.triton.softmax import LOG2_E, denominator, rotate_back

_ROWS = 4


@dataclass(frozen=True)
class Parts:
    """Chunks of R tokens and H heads: rows [R, H, S, D], maxima (log 2) and sums [R, H, S]."""

    total: Tensor
    top: Tensor
    norm: Tensor

    @classmethod
    def empty(cls, q_RHC: Tensor, chunks: int) -> Parts:
        rows, heads, channels = q_RHC.shape
        fp32, device = torch.float32, q_RHC.device
        return cls(
            torch.empty((rows, heads, chunks, channels), dtype=fp32, device=device),
            torch.empty((rows, heads, chunks), dtype=fp32, device=device),
            torch.empty((rows, heads, chunks), dtype=fp32, device=device),
        )


@triton.jit
def _combine(
    total, top, norm, sink, cos, sin, out, rows, heads, chunks,
    LOG2_E: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    column = tl.arange(0, D)
    first = row.to(tl.int64) * chunks
    best = tl.full([ROWS], -1e30, tl.float32)
    for chunk in tl.range(0, chunks):
        best = tl.maximum(best, tl.load(top + first + chunk, mask=inside, other=-1e30))
    weight = tl.zeros([ROWS], tl.float32)
    joined = tl.zeros([ROWS, D], tl.float32)
    for chunk in tl.range(0, chunks):
        part = tl.load(norm + first + chunk, mask=inside, other=0.0)
        share = tl.exp2(tl.load(top + first + chunk, mask=inside, other=-1e30) - best)
        at = (first + chunk)[:, None] * D + column[None, :]
        values = tl.load(total + at, mask=(part > 0.0)[:, None], other=0.0)
        weight += share * part
        joined += share[:, None] * values
    sink_log2 = tl.load(sink + row % heads, mask=inside, other=0.0) * LOG2_E
    joined = joined / denominator(weight, best, sink_log2)[:, None]
    token = tl.minimum(row, rows - 1) // heads
    joined = rotate_back(joined, token, cos, sin, ROWS, D, 0, D, PAIRS)
    at = row.to(tl.int64)[:, None] * D + column[None, :]
    tl.store(out + at, joined.to(out.dtype.element_ty), mask=inside[:, None])


def combine(
    parts: Parts, sink_H: Tensor, cos_RP: Tensor, sin_RP: Tensor, *, dtype: torch.dtype
) -> Tensor:
    """[R, H, D] in `dtype`: all chunks, the sink, and the rotation back."""
    rows, heads, chunks, channels = parts.total.shape
    out = torch.empty((rows, heads, channels), dtype=dtype, device=parts.total.device)
    launch(
        _combine, (triton.cdiv(rows * heads, _ROWS),),
        parts.total, parts.top, parts.norm, sink_H, cos_RP, sin_RP, out,
        rows * heads, heads, chunks,
        LOG2_E=LOG2_E, ROWS=_ROWS, D=channels, PAIRS=cos_RP.shape[1],
        num_warps=4, num_stages=2,
    )  # fmt: skip
    return out


CASES = (
    Case(
        "combine, 8 chunks",
        lambda: combine(
            Parts.empty(meta(32, 64, 512), 8),
            meta(64, dtype=torch.float32),
            meta(32, 32, dtype=torch.float32),
            meta(32, 32, dtype=torch.float32),
            dtype=torch.bfloat16,
        ),
    ),
)
