"""The one door to the GPU: every kernel is launched, or recorded for offline compilation, here.

A launcher passes its runtime arguments in the kernel's order and its constants by name. Under
`recording()` the same launchers run on tensors of the `meta` device and nothing is executed: what
`kernels.triton.compile` compiles is therefore what a GPU would be given, by construction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

Grid = tuple[int, ...]
BATCH_SIZES = ("rows", "row_tiles")
"""Arguments that say how many rows share a call. Triton would compile a kernel of its own for 1 and
for multiples of 16, whose sums might run in another order: class `exact` needs one for all.
"""


@dataclass(frozen=True)
class Launch:
    """One recorded launch: the kernel, its runtime arguments in order, constants and options."""

    kernel: Any
    args: tuple[Any, ...]
    consts: Mapping[str, Any]
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Case:
    """A production configuration: a name and a call of the op on `meta` tensors.

    `tensor_cores` names the kernels that must use them: "wgmma" (Hopper, 64-row tiles) or "mma".
    `shown` is what the table says about the shape.
    """

    name: str
    call: Callable[[], object]
    tensor_cores: Mapping[str, str] = field(default_factory=dict)


_recorded: ContextVar[list[Launch] | None] = ContextVar("recorded launches", default=None)


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Collect launches instead of executing them."""
    launches: list[Launch] = []
    token = _recorded.set(launches)
    try:
        yield launches
    finally:
        _recorded.reset(token)


def launch(
    kernel: Any, grid: Grid, *args: Any, num_warps: int = 4, num_stages: int = 2, **consts: Any
) -> None:
    """Run `kernel` over `grid` on the device of its first tensor; an empty grid does nothing."""
    recorded = _recorded.get()
    if recorded is not None:
        recorded.append(Launch(kernel, args, consts, num_warps, num_stages))
        return
    if 0 in grid:
        return
    options = {"num_warps": num_warps, "num_stages": num_stages}
    device = next(a.device for a in map(_tensor_of, args) if a is not None)
    if device.type == "cuda":
        with torch.cuda.device(device):
            kernel[grid](*args, **consts, **options)
    else:
        kernel[grid](*args, **consts, **options)


def _tensor_of(arg: object) -> Tensor | None:
    if isinstance(arg, TensorDescriptor):
        arg = arg.base
    return arg if isinstance(arg, Tensor) else None


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A tensor without data, for a `Case`."""
    return torch.empty(shape, dtype=dtype, device="meta")
