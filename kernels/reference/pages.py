"""Paged rows: a page holds the data of all its rows, then their scales (deepseek-v4.md 3.1).

A slot is a physical row number, page * page_rows + offset; -1 means none. Attention rows are
`nope` e4m3 channels, then bfloat16 channels, with one ue8m0 scale per 64 nope channels (8 bytes a
row); index rows are e2m1 pairs with one ue8m0 scale per 32 channels.

Shape suffixes: R rows, D channels, P pages, B bytes of a page.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.reference import rows

_SCALE_BYTES = 8


@dataclass(frozen=True)
class KvPages:
    """Geometry of attention pages: 584 B a row for 512 = 448 + 64 channels."""

    page_rows: int
    dim: int
    nope: int

    def __post_init__(self) -> None:
        if not 0 < self.nope <= _SCALE_BYTES * rows.FP8_GROUP:
            raise ValueError(
                f"paged rows need 1 to 512 e4m3 channels, not {self.nope}; "
                "use the KV format bf16 for this head size"
            )
        # Scales are read as words of 8 bytes, so they must begin at one.
        if self.data_bytes % 8:
            raise ValueError(
                f"paged rows need a multiple of 8 bytes before their scales, not "
                f"{self.data_bytes} ({self.nope} e4m3 and {self.dim - self.nope} bfloat16 channels)"
            )

    @property
    def data_bytes(self) -> int:
        return self.nope + 2 * (self.dim - self.nope)

    @property
    def scale_bytes(self) -> int:
        return _SCALE_BYTES

    @property
    def page_bytes(self) -> int:
        """Whole data rows, so that every page begins as aligned as the first."""
        used = self.page_rows * (self.data_bytes + _SCALE_BYTES)
        return -(-used // self.data_bytes) * self.data_bytes


@dataclass(frozen=True)
class IndexPages:
    """Geometry of index-key pages: 68 B a row for 128 channels."""

    page_rows: int
    dim: int

    def __post_init__(self) -> None:
        if self.dim % rows.FP4_GROUP:
            raise ValueError(f"index rows need a multiple of 32 channels, not {self.dim}")

    @property
    def data_bytes(self) -> int:
        return self.dim // 2

    @property
    def scale_bytes(self) -> int:
        return self.dim // rows.FP4_GROUP

    @property
    def page_bytes(self) -> int:
        used = self.page_rows * (self.data_bytes + self.scale_bytes)
        return -(-used // 16) * 16


def write_rows(
    data_RB: Tensor, slots_R: Tensor, pages_PB: Tensor, layout: KvPages | IndexPages
) -> None:
    """Put encoded rows [R, data + scale bytes] into their slots; rows of slot -1 go nowhere."""
    wanted = slots_R >= 0
    slots, data = slots_R[wanted].long(), data_RB[wanted]
    page, row = slots // layout.page_rows, slots % layout.page_rows
    size, scale = layout.data_bytes, layout.scale_bytes
    at = row[:, None] * size + torch.arange(size, device=row.device)
    pages_PB[page[:, None], at] = data[:, :size]
    at = layout.page_rows * size + row[:, None] * scale + torch.arange(scale, device=row.device)
    pages_PB[page[:, None], at] = data[:, size : size + scale]


def read_rows(pages_PB: Tensor, slots_R: Tensor, layout: KvPages | IndexPages) -> Tensor:
    """uint8 [R, data + scale bytes] of the slots; zeros for slot -1."""
    slots = slots_R.clamp_min(0).long()
    page, row = slots // layout.page_rows, slots % layout.page_rows
    size, scale = layout.data_bytes, layout.scale_bytes
    at = row[:, None] * size + torch.arange(size, device=row.device)
    end = layout.page_rows * size + row[:, None] * scale
    at = torch.cat((at, end + torch.arange(scale, device=row.device)), 1)
    return pages_PB[page[:, None], at].masked_fill_(slots_R[:, None] < 0, 0)
