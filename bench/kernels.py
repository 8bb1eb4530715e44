"""Every device op on the device at hand: `python -m bench.kernels` (or `make bench-gpu`).

One run measures the ceilings (a large product, a large copy), checks every op against its reference
(float64 where that takes it), times it beside the same op in torch (compiled), and says which part
of its ceiling it reaches. With
`--tiny` the shapes are small enough for a CPU, where kernels run in Triton's interpreter: that
proves the script, its times mean nothing.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench import kernels_attention, kernels_cases
from bench import machine as where
from bench.kernels_clock import Clock, ceilings
from bench.kernels_work import Case, Work
from bench.report import Report, cell, check_writable
from kernels.device import ReferenceDeviceOps
from kernels.dispatch import load_device

_SHOWS_NOT = (
    "any other shape, device or version than those named",
    "a whole layer or model: ops are timed alone, with cold second-level caches",
)
_ROUNDS = 30
CASES = (*kernels_attention.CASES, *kernels_cases.CASES)


def facts(device: torch.device) -> dict[str, object]:
    """The machine's, and the device's name, memory, driver and CUDA version."""
    found: dict[str, object] = dict(where.machine())
    found["device"] = "cpu"
    if device.type == "cuda":
        known = torch.cuda.get_device_properties(device)
        found["device"] = known.name
        found["device_memory_gib"] = round(known.total_memory / 2**30, 1)
        found["device_processors"] = known.multi_processor_count
        found["compute_capability"] = f"{known.major}.{known.minor}"
        found["cuda"] = torch.version.cuda
        found["driver"] = driver()
    return found


def driver() -> str:
    """Version of the kernel module; "" where it does not say."""
    path = Path("/proc/driver/nvidia/version")
    try:
        words = path.read_text(encoding="utf-8").splitlines()[0].split()
    except (OSError, IndexError):
        return ""
    return next((word for word in words if word[0].isdigit() and "." in word), "")


def rate(work: Work, spent_us: float, limits: Mapping[str, float | None]) -> dict[str, Any]:
    """TFLOP/s and GB/s reached, and the part of the ceiling that binds this op."""
    tflops = work.flops / spent_us * 1e-6
    moved = work.moved_bytes / spent_us * 1e-3
    name = {"copy": "copy_gb_per_s"}.get(work.ceiling, f"{work.ceiling}_tflops")
    top = limits[name]
    reached = moved if work.ceiling == "copy" else tflops
    return {
        "tflops": tflops or None,
        "gb_per_s": moved,
        "bound": work.ceiling,
        "of_ceiling": None if top is None else reached / top,
    }


def measure(
    case: Case,
    ops: ReferenceDeviceOps,
    clock: Clock,
    device: torch.device,
    limits: Mapping[str, float | None],
    *,
    tiny: bool,
    compiled: bool,
) -> dict[str, Any]:
    """One row of the table. `right` says whether the op is within its stated distance."""
    torch.manual_seed(0)
    work = case.make(device, tiny)
    error = work.error(ops)
    timing = clock.time(lambda: work.call(ops))
    row = {
        "op": case.name,
        "right": error <= work.limit,
        "error": error,
        "limit": work.limit,
        "us": timing.median_us,
        "captured": timing.captured,
        **rate(work, timing.median_us, limits),
        "target": case.target,
        "target_us": case.target_us,
        "published": case.published or None,
        "torch_us": None,
        "speedup": None,
    }
    if compiled:
        other = torch_us(work, clock)
        row["torch_us"] = other
        row["speedup"] = None if other is None else other / timing.median_us
    return row


def torch_us(work: Work, clock: Clock) -> float | None:
    """The reference, compiled by torch; None where the compiler or the memory gives up."""
    reference = ReferenceDeviceOps()
    call: Callable[[], object] = torch.compile(lambda: work.call(reference))
    try:
        return clock.time(call).median_us
    except Exception:  # whatever a compiler may raise: the figure is then not there
        return None


def shown(rows: Sequence[Mapping[str, Any]], limits: Mapping[str, float | None]) -> Table:
    title = ", ".join(f"{name} {cell(value)}" for name, value in limits.items())
    table = Table(title=f"device ops; ceilings of this run: {title}", title_justify="left")
    for name in rows[0] if rows else ():
        table.add_column(name.replace("_", " "), justify="left" if name == "op" else "right")
    for row in rows:
        table.add_row(*(cell(value) for value in row.values()))
    return table


def main(argv: Sequence[str] | None = None, *, console: Console | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backend", choices=("auto", "triton", "reference"))
    parser.add_argument("--tiny", action="store_true", help="small shapes, one round")
    parser.add_argument("--only", default="", help="ops whose name contains this")
    parser.add_argument("--no-torch", action="store_true", help="leave out torch's own time")
    parser.add_argument("--json", type=Path, help="write the report here too")
    args = parser.parse_args(argv)
    console = console or Console()
    device = torch.device(args.device)
    if device.type != "cuda" and not args.tiny:
        console.print("there is no CUDA device here; try the script with --tiny, or use a GPU")
        return 2
    check_writable(args.json)
    began_s = time.perf_counter()
    ops = load_device(device, args.backend)
    clock = Clock(device, rounds=1 if args.tiny else _ROUNDS)
    kind = {"tiny": args.tiny, "compiled": not args.no_torch}
    rows = []
    try:
        limits = ceilings(clock, device, side=128 if args.tiny else 8192)
        for case in CASES:
            if args.only in case.name:
                rows.append(measure(case, ops, clock, device, limits, **kind))
                if device.type == "cuda":
                    torch.cuda.empty_cache()
    finally:
        clock.close()
    report = Report(
        bench="kernels",
        settings={"backend": ops.name, "tiny": args.tiny, "ceilings": limits},
        tables={"ops": rows},
        shows_not=_SHOWS_NOT,
        wall_s=time.perf_counter() - began_s,
        machine=facts(device),
    )
    console.print(shown(rows, limits))
    for edge in _SHOWS_NOT:
        console.print(f"does not show: {edge}")
    if args.json is not None:
        args.json.write_text(report.to_json() + "\n", encoding="utf-8")
    return 0 if all(row["right"] for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
