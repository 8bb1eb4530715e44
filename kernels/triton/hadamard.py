"""Normalised Walsh-Hadamard rotation as a product; meaning in kernels/reference/hadamard.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.launch import Case, launch, meta
from kernels.triton.numerals import rotate_signs

_ROWS = 64


@triton.jit
def load_signs(matrix, C: tl.constexpr):
    at = tl.arange(0, C)
    return tl.load(matrix + at[:, None] * C + at[None, :]).to(tl.bfloat16)


@triton.jit
def _hadamard(x, matrix, out, rows, ROWS: tl.constexpr, C: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = row.to(tl.int64)[:, None] * C + tl.arange(0, C)[None, :]
    inside = (row < rows)[:, None]
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, rotate_signs(value, load_signs(matrix, C), C), mask=inside)


def hadamard(x_RC: Tensor, matrix_CC: Tensor) -> Tensor:
    rows, channels = x_RC.shape
    out = torch.empty((rows, channels), dtype=torch.float32, device=x_RC.device)
    launch(
        _hadamard,
        (triton.cdiv(rows, _ROWS),),
        x_RC.contiguous(),
        matrix_CC,
        out,
        rows,
        ROWS=_ROWS,
        C=channels,
        num_warps=4,
        num_stages=1,
    )
    return out


CASES = (
    Case(
        "hadamard, 128",
        lambda: hadamard(meta(65536, 128), meta(128, 128, dtype=torch.float32)),
        {"_hadamard": "wgmma"},
    ),
)
