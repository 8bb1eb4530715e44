"""MXFP4: e2m1 codes with one ue8m0 scale per 32 channels (deepseek-v4.md 5.1).

The same format carries expert weights (codes and scales in two tensors) and, in pages, the
indexer's keys.

Shape suffixes: R rows, C channels (a multiple of 32), P pages, B bytes of a page.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.reference import rows
from kernels.reference.hadamard import hadamard
from kernels.reference.pages import IndexPages, write_rows
from kernels.reference.wide import wide


def mxfp4_encode(x_RC: Tensor) -> tuple[Tensor, Tensor]:
    """Codes uint8 [R, C / 2] (even channel in the low nibble) and ue8m0 scales uint8 [R, C / 32].

    Nearest value, ties to the even code; the scale is a power of two, rounded up.
    """
    with torch.device(x_RC.device):
        data = rows.fp4_encode(x_RC.float())
    half = x_RC.shape[1] // 2
    return data[:, :half].contiguous(), data[:, half:].contiguous()


def mxfp4_decode(codes_RX: Tensor, scales_RX: Tensor, *, dtype: torch.dtype) -> Tensor:
    """[R, C] values in `dtype`; bfloat16 and wider are exact."""
    with torch.device(codes_RX.device):
        data = torch.cat((codes_RX, scales_RX), 1)
        return rows.fp4_decode(data, 2 * codes_RX.shape[1]).to(dtype)


def _turned(x_RC: Tensor, matrix_CC: Tensor) -> Tensor:
    """The Hadamard rotation, fp32; in float64 on the way if it was given that."""
    x = wide(x_RC)
    return hadamard(x, matrix_CC.to(x.dtype)).float()


def quantize_index(
    x_RC: Tensor, matrix_CC: Tensor, slots_R: Tensor, pages_PB: Tensor, layout: IndexPages
) -> None:
    """Hadamard rotation, FP4 rounding and paged store of index keys; slot -1 is skipped."""
    with torch.device(x_RC.device):
        data = rows.fp4_encode(_turned(x_RC, matrix_CC))
    write_rows(data, slots_R, pages_PB, layout)


def round_index(x_RC: Tensor, matrix_CC: Tensor) -> tuple[Tensor, Tensor]:
    """Index queries: Hadamard rotation, FP4 rounding, carried as e4m3 [R, C] and a scale [R] fp32.

    The scale is the row's largest block scale / 64, so the largest code is 6 * 64 = 384. Lossless
    while the row's block scales lie within 2^14 of each other; below that a value is rounded to
    2^-9 of the scale.
    """
    with torch.device(x_RC.device):
        data = rows.fp4_encode(_turned(x_RC, matrix_CC))
        values = rows.fp4_decode(data, x_RC.shape[1])
        top = data[:, x_RC.shape[1] // 2 :].amax(1).to(torch.int32).clamp_min(7) - 6
        scale = (top << 23).view(torch.float32)
    return (values / scale[:, None]).to(torch.float8_e4m3fn), scale
