"""Device ops and the engine over them, on the device at hand: `python -m bench.kernels` (or
`make bench-gpu`).

Three parts, each to be had alone with `--parts`:

- `ops`: measures the ceilings (a large product, a large copy), checks every op against its
  reference (float64 where that takes it), times it beside the same op in torch (compiled), and says
  which part of its ceiling it reaches;
- `stack`: a Flash-shaped stack of layers with random weights as an engine runs it, contexts up to a
  million, classes `fast` and `exact`, and whether `exact` gives the same bits on every path;
- `ledger`: the shipped model with separate prefill and decode workers, every answer checked.

With `--tiny` the shapes are small enough for a CPU (the reference ops, or kernels in Triton's
interpreter): that proves the script, its times mean nothing.
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

from bench import kernels_attention, kernels_cases, kernels_ledger, kernels_products, kernels_stack
from bench import machine as where
from bench.kernels_clock import Clock, ceilings
from bench.kernels_work import Case, Work
from bench.report import Report, Row, cell, check_writable, table
from kernels.device import ReferenceDeviceOps
from kernels.dispatch import load_device

_SHOWS_NOT = (
    "any other shape, device or version than those named",
    "in `ops`, a whole layer: ops are timed alone, with cold second-level caches",
    "in `stack`, a trained model: weights are random, so its routing is even and its text is noise",
)
PARTS = ("ops", "stack", "ledger")
_ROUNDS = 30
CASES = (*kernels_attention.CASES, *kernels_cases.CASES, *kernels_products.CASES)


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
    args = _arguments(argv)
    console = console or Console()
    device = torch.device(args.device)
    if device.type != "cuda" and not args.tiny:
        console.print("there is no CUDA device here; try the script with --tiny, or use a GPU")
        return 2
    check_writable(args.json)
    if device.type == "cpu":
        # Small tensors on shared cores: a second thread costs many times what it gives.
        torch.set_num_threads(1)
    began_s = time.perf_counter()
    ops = load_device(device, args.backend)
    limits: dict[str, float | None] = {}
    tables: dict[str, Sequence[Row]] = {}
    if "ops" in args.parts:
        tables["ops"], limits = measured_ops(args, ops, device)
        console.print(shown(tables["ops"], limits))
    if "stack" in args.parts:
        plan = kernels_stack.StackPlan.tiny() if args.tiny else kernels_stack.StackPlan.full()
        contexts, promises = kernels_stack.run(plan, device, backend=args.backend)
        tables |= {"stack": contexts, "promises of class exact": promises}
    if "ledger" in args.parts:
        size = {"tokens": 600, "questions": 3} if args.tiny else {"tokens": 32_768, "questions": 8}
        tables["ledger"] = kernels_ledger.run(device.type, **size)
    for title in (name for name in tables if name != "ops"):
        console.print(table(title, tables[title]))
    report = Report(
        bench="kernels",
        settings={"backend": ops.name, "tiny": args.tiny, "ceilings": limits, "parts": args.parts},
        tables=tables,
        shows_not=_SHOWS_NOT,
        wall_s=time.perf_counter() - began_s,
        machine=facts(device),
    )
    for edge in _SHOWS_NOT:
        console.print(f"does not show: {edge}")
    if args.json is not None:
        args.json.write_text(report.to_json() + "\n", encoding="utf-8")
    return 0 if all(map(_good, (row for rows in tables.values() for row in rows))) else 1


def _good(row: Row) -> bool:
    """An op within its distance, a promise kept, every answer right."""
    answered = row.get("questions", 0) == row.get("right", 0) if "questions" in row else True
    return answered and row.get("right", True) is not False and row.get("same_bits", True)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backend", choices=("auto", "triton", "reference"))
    parser.add_argument("--tiny", action="store_true", help="small shapes, one round")
    parser.add_argument("--parts", type=_parts, default=PARTS, help=f"some of {','.join(PARTS)}")
    parser.add_argument("--only", default="", help="ops whose name contains this")
    parser.add_argument("--no-torch", action="store_true", help="leave out torch's own time")
    parser.add_argument("--json", type=Path, help="write the report here too")
    return parser.parse_args(argv)


def _parts(text: str) -> tuple[str, ...]:
    asked = tuple(text.split(","))
    if unknown := [part for part in asked if part not in PARTS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(PARTS)}")
    return asked


def measured_ops(
    args: argparse.Namespace, ops: ReferenceDeviceOps, device: torch.device
) -> tuple[list[dict[str, Any]], dict[str, float | None]]:
    """Rows of the table of ops, and the ceilings of this run."""
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
    return rows, limits


if __name__ == "__main__":
    raise SystemExit(main())
