"""Attention rows into and out of the paged FP8 cache (deepseek-v4.md 3.1, 5.4, T28).

Shape suffixes: R rows, D channels, P pages, B bytes of a page.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.reference import rows
from kernels.reference.pages import KvPages, read_rows, write_rows


def quantize_kv(x_RD: Tensor, slots_R: Tensor, pages_PB: Tensor, layout: KvPages) -> None:
    """Round rows and write them into their slots of `pages_PB` (uint8), in place.

    x is fp32 or bfloat16; a row of slot -1 is skipped. No slot may occur twice.
    """
    with torch.device(x_RD.device):
        data = rows.fp8_encode(x_RD.float(), layout.nope)
    write_rows(data, slots_R, pages_PB, layout)


def dequantize_gather(
    pages_PB: Tensor,
    slots_R: Tensor,
    layout: KvPages,
    *,
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """[R, D] values of the slots in `dtype`, zeros for slot -1. bfloat16 and wider are exact.

    `out`: contiguous rows of that type to write to and return, in place of new ones.
    """
    data = read_rows(pages_PB, slots_R, layout)
    with torch.device(data.device):
        values = rows.fp8_decode(data, layout.dim, layout.nope).to(dtype)
    return values if out is None else out.copy_(values)
