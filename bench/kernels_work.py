"""What a measured call is, and the random inputs that the cases share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.device import ReferenceDeviceOps
from kernels.reference.pages import IndexPages, KvPages

Ops = ReferenceDeviceOps


@dataclass(frozen=True)
class Work:
    """`call(ops)` is what is timed, with any set of ops. `flops` run at the ceiling named by
    `ceiling` ("bf16", "e4m3" or "copy"); `moved_bytes` is what must cross memory at least.
    `error(ops)` is the distance from float64 relative to the largest value, `limit` its bound.
    """

    call: Callable[[Ops], object]
    error: Callable[[Ops], float]
    limit: float
    moved_bytes: float
    flops: float = 0.0
    ceiling: str = "copy"


@dataclass(frozen=True)
class Case:
    """`target` is the fraction of the ceiling that kernels.md asks for, `target_us` a latency,
    `published` the best figure known for a comparable kernel on Hopper.
    """

    name: str
    make: Callable[[torch.device, bool], Work]
    target: float | None = None
    target_us: float | None = None
    published: str = ""


def distance(found: Tensor, exact: Tensor) -> float:
    gap = (found.double() - exact.double()).abs().max().item()
    return gap / max(exact.double().abs().max().item(), 1e-30)


def normal(device: torch.device, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device=device).to(dtype)


def angles(device: torch.device, rows: int) -> tuple[Tensor, Tensor]:
    angle = torch.rand(rows, 32, device=device) * 6.28
    return torch.cos(angle), torch.sin(angle)


def numbered(device: torch.device, rows: int) -> Tensor:
    return torch.arange(rows, device=device, dtype=torch.int32)


def empty_pages(device: torch.device, rows: int, layout: KvPages | IndexPages) -> Tensor:
    count = -(-rows // layout.page_rows)
    return torch.zeros(count, layout.page_bytes, dtype=torch.uint8, device=device)


KV_PAGES = KvPages(page_rows=64, dim=512, nope=448)
INDEX_PAGES = IndexPages(page_rows=64, dim=128)
