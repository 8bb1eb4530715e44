"""The engine alone, in process: `exact` beside `fast` and, if asked for, beside transformers.

Every length of every side runs in a process of its own, sides in turn, so that memory is measured
apart and no side has the quieter minute to itself.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench.engine_case import Case
from bench.engine_models import write_flash_shaped
from bench.report import Report, Row
from bench.stats import median, ratio
from penstock.errors import PenstockError, UsageError
from penstock.folder import model_folder

RANDOM_MODEL = "flash-shaped"
_OUR_CHUNK = 8192
_SHOWS_NOT = (
    "wall time on a shared machine: times are CPU seconds of one thread",
    "batches: one sequence at a time",
    "other numbers than float32: KV and activations are fp32 on both sides",
)


@dataclass(frozen=True)
class Plan:
    """What to measure. `models`: `ledger`, `flash-shaped` or folders."""

    models: tuple[str, ...]
    lengths: tuple[int, ...]
    against: str | None
    """`transformers` or None."""
    against_most: int
    """Longest prompt that the other side is given."""
    against_chunk: int
    """Prompt tokens of one of its calls; 0: the whole prompt."""
    repeats: int
    steps: int
    budget_s: float
    seed: int


def check(plan: Plan) -> None:
    """Raises UsageError before a minute of measuring."""
    if plan.against not in (None, "transformers"):
        raise UsageError(f"--against is {plan.against!r}; only transformers is known")
    if plan.against and find_spec("transformers") is None:
        raise UsageError(
            "--against transformers needs it installed; run `pip install penstock[parity]`"
        )


def run(plan: Plan) -> Report:
    """Raises UsageError before a minute of measuring, PenstockError if a case fails."""
    check(plan)
    began_s = time.monotonic()
    return Report(
        bench="engine",
        settings=asdict(plan),
        tables=tables_of(plan),
        shows_not=_SHOWS_NOT,
        wall_s=time.monotonic() - began_s,
    )


def tables_of(plan: Plan) -> dict[str, list[Row]]:
    """Tables by title."""
    tables: dict[str, list[Row]] = {}
    with tempfile.TemporaryDirectory(prefix="penstock-bench-") as scratch:
        for model in plan.models:
            folder = _folder(model, Path(scratch), plan.seed)
            if folder is None:
                raise UsageError("--alone measures an engine; `fake` has none")
            rows = [_row(plan, folder, length) for length in plan.lengths]
            tables[f"engine alone: {Path(model).name}"] = rows
            tables[f"growth: {Path(model).name}"] = growth(rows)
    return tables


def _folder(model: str, scratch: Path, seed: int) -> str | None:
    if model == RANDOM_MODEL:
        write_flash_shaped(scratch / RANDOM_MODEL, seed=seed)
        return str(scratch / RANDOM_MODEL)
    folder = model_folder(model)
    return None if folder is None else str(folder)


def _row(plan: Plan, folder: str, length: int) -> Row:
    ours = Case(
        side="ours",
        folder=folder,
        tokens=length,
        repeats=plan.repeats,
        steps=plan.steps,
        numerics="exact",
        kv="fp32",
        chunk=_OUR_CHUNK,
        budget_s=plan.budget_s,
        seed=plan.seed,
    )
    exact = measure(ours)
    fast = measure(replace(ours, numerics="fast"))
    theirs = None
    if plan.against and length <= plan.against_most:
        theirs = measure(replace(ours, side=plan.against, chunk=plan.against_chunk or length))
    return row(length, exact, fast, theirs)


def row(
    length: int, exact: dict[str, Any], fast: dict[str, Any], theirs: dict[str, Any] | None
) -> Row:
    """One length of one model. Pure. A figure of transformers is null where it was not run."""
    prefill, step = median(exact["prefill_cpu_s"]), median(exact["decode_cpu_s"])
    found: dict[str, Any] = {
        "prompt_tokens": length,
        "n": len(exact["prefill_cpu_s"]),
        "prefill_tokens_per_s": length / prefill,
        "prefill_s": prefill,
        "decode_ms": step * 1e3,
        "peak_mib": exact["peak_mib"],
        "loaded_mib": exact["loaded_mib"],
        "exact_by_fast_prefill": ratio(prefill, median(fast["prefill_cpu_s"])),
        "exact_by_fast_decode": ratio(step, median(fast["decode_cpu_s"])),
        "fast_worst_logit_difference": worst(exact["logits"], fast["logits"]),
    }
    other: dict[str, Any] = dict.fromkeys(
        (
            "transformers_n",
            "transformers_prefill_tokens_per_s",
            "transformers_decode_ms",
            "transformers_peak_mib",
            "prefill_times_faster",
            "decode_times_faster",
            "worst_logit_difference",
        )
    )
    if theirs is not None:
        their_prefill, their_step = median(theirs["prefill_cpu_s"]), median(theirs["decode_cpu_s"])
        other = {
            "transformers_n": len(theirs["prefill_cpu_s"]),
            "transformers_prefill_tokens_per_s": length / their_prefill,
            "transformers_decode_ms": their_step * 1e3,
            "transformers_peak_mib": theirs["peak_mib"],
            "prefill_times_faster": ratio(their_prefill, prefill),
            "decode_times_faster": ratio(their_step, step),
            "worst_logit_difference": worst(exact["logits"], theirs["logits"]),
        }
    return {**found, **other}


def worst(a: Sequence[float], b: Sequence[float]) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def growth(rows: Sequence[Row]) -> list[Row]:
    """Each length against the shortest: how time grows. Pure."""
    first = rows[0]
    return [
        {
            "prompt_tokens": r["prompt_tokens"],
            "times_longer": r["prompt_tokens"] / first["prompt_tokens"],
            "prefill_time_times": ratio(r["prefill_s"], first["prefill_s"]),
            "decode_time_times": ratio(r["decode_ms"], first["decode_ms"]),
        }
        for r in rows
    ]


def measure(case: Case) -> dict[str, Any]:
    """Run it. Raises PenstockError with its last line of error."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.engine_case", case.to_json()],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        words = done.stderr.strip().splitlines()
        raise PenstockError(
            f"{case.side} at {case.tokens} tokens failed: {words[-1] if words else done.returncode}"
        )
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found
