"""What the tests of the Triton kernels share: seeded data, and the distance of two tensors."""

from __future__ import annotations

import torch
from hypothesis import Phase, settings
from torch import Tensor

from kernels.device import ReferenceDeviceOps
from kernels.dispatch import load_device

REFERENCE: ReferenceDeviceOps = load_device("cpu", "reference")
TRITON: ReferenceDeviceOps = load_device("cpu", "triton")


def examples(count: int) -> settings:
    """So many drawn cases. No shrinking: a case takes up to a second in the interpreter."""
    phases = (Phase.explicit, Phase.reuse, Phase.generate)
    return settings(max_examples=count, deadline=None, phases=phases)


class Draw:
    """Tensors of one seed. Values hold zeros, signed zeros and repeats, as real rows do."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
        return (torch.randn(shape, generator=self.generator) * scale).to(dtype)

    def rows(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Values over many orders of magnitude, some rows zero."""
        size = torch.randint(-30, 12, (*shape[:-1], 1), generator=self.generator).float()
        x = self.normal(*shape) * torch.exp2(size)
        flat = x.view(-1)
        flat[::7], flat[3::11] = 0.0, -0.0
        x.view(-1, shape[-1])[::5] = 0.0
        return x.to(dtype)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator, dtype=torch.int32)

    def slots(self, rows: int, capacity: int) -> Tensor:
        """Distinct slots, some -1."""
        slots = torch.randperm(capacity, generator=self.generator)[:rows].to(torch.int32)
        slots[torch.rand(rows, generator=self.generator) < 0.2] = -1
        return slots


def distance(found: Tensor, wanted: Tensor) -> float:
    """Largest difference over the largest size of `wanted`; nan compares as infinite."""
    assert found.shape == wanted.shape, (found.shape, wanted.shape)
    if not found.numel():
        return 0.0
    gap = (found.double() - wanted.double()).abs().max().item()
    size = max(wanted.double().abs().max().item(), 1e-30)
    return gap / size if gap == gap else float("inf")
