"""Time of one call on a device: captured as a graph where it can be, caches flushed between runs.

Without CUDA the same door measures wall time, so that the script can be tried anywhere.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Call = Callable[[], object]
_FLUSH_BYTES = 256 << 20
"""More than any second-level cache of the devices in question."""


@dataclass(frozen=True)
class Timing:
    """Median of `rounds` runs; `captured` says whether launches were replayed from a graph."""

    median_us: float
    rounds: int
    captured: bool


class Clock:
    """Owns the flush buffer; `close` frees it."""

    def __init__(self, device: torch.device, *, rounds: int) -> None:
        self._device, self._rounds = device, rounds
        size = _FLUSH_BYTES if device.type == "cuda" else 0
        self._flush: Tensor | None = torch.empty(size, dtype=torch.uint8, device=device)

    def close(self) -> None:
        self._flush = None

    def time(self, call: Call) -> Timing:
        if self._device.type != "cuda":
            return self._wall(call)
        with torch.cuda.device(self._device):
            return self._events(call)

    def _wall(self, call: Call) -> Timing:
        spent = []
        for _ in range(self._rounds):
            began_s = time.perf_counter()
            call()
            spent.append((time.perf_counter() - began_s) * 1e6)
        return Timing(sorted(spent)[len(spent) // 2], self._rounds, False)

    def _events(self, call: Call) -> Timing:
        for _ in range(3):
            call()
        torch.cuda.synchronize()
        replay, captured = call, False
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                call()
            replay, captured = graph.replay, True
        except RuntimeError:
            # A reference that looks at its data cannot be captured; it is timed as it is called.
            torch.cuda.synchronize()
        spent = []
        for _ in range(self._rounds):
            if self._flush is not None:
                self._flush.zero_()
            begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            begin.record()
            replay()
            end.record()
            end.synchronize()
            spent.append(float(begin.elapsed_time(end)) * 1e3)
        return Timing(sorted(spent)[len(spent) // 2], self._rounds, captured)


def ceilings(clock: Clock, device: torch.device, *, side: int) -> dict[str, float | None]:
    """What this device reaches in this run: TFLOP/s of a square product in bfloat16 and in e4m3,
    GB/s (read and written) of a copy. None where torch cannot do it.
    """
    a = torch.randn(side, side, device=device).to(torch.bfloat16)
    product_us = clock.time(lambda: torch.mm(a, a)).median_us
    source = torch.empty(side * side * 16, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_us = clock.time(lambda: target.copy_(source)).median_us
    return {
        "bf16_tflops": 2e-6 * side**3 / product_us,
        "e4m3_tflops": _e4m3_tflops(clock, device, side),
        "copy_gb_per_s": 2e-3 * source.numel() / copy_us,
    }


def _e4m3_tflops(clock: Clock, device: torch.device, side: int) -> float | None:
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        return None
    a = torch.zeros(side, side, device=device).to(torch.float8_e4m3fn)
    one = torch.ones((), device=device)

    def product() -> Tensor:
        return torch._scaled_mm(a, a.t(), one, one, out_dtype=torch.bfloat16)

    return 2e-6 * side**3 / clock.time(product).median_us
