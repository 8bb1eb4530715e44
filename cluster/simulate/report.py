"""Results as a table and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cluster.simulate.figures import Result
from cluster.simulate.overload import Point

_LEAST_WIDTH = 200


def rows(result: Result) -> dict[str, str]:
    """One result's figures as they are shown, by their names."""
    refused = ", ".join(f"{count} {reason}" for reason, count in sorted(result.refused.items()))
    return {
        "requests served": f"{result.served:,} of {result.requests:,}",
        "refused": refused or "-",
        "goodput, requests/s": _number(result.goodput),
        "within the SLO": f"{100 * result.within:.1f} %",
        "hit rate": f"{result.hit_rate:.4f}",
        "TTFT mean, s": _number(result.ttft_mean_s),
        "TTFT p50 / p90 / p99, s": _three(result.ttft_s),
        "token gap p50 / p90 / p99, ms": _three(result.gap_s, 1e3),
        "E2E p50 / p90 / p99, s": _three(result.e2e_s),
        "prompt tokens": f"{result.prompt_tokens:,}",
        "  of them computed": f"{result.computed_tokens:,}",
        "answer tokens": f"{result.answer_tokens:,}",
        "evictions": f"{result.evictions:,}",
        "store at the end, GB": _number(result.store_bytes / 1e9),
        "prefill workers mean / most": _workers(result.prefill.workers_mean, result, "prefill"),
        "decode workers mean / most": _workers(result.decode.workers_mean, result, "decode"),
        "prefill busy": f"{100 * result.prefill.busy:.0f} %",
        "decode busy": f"{100 * result.decode.busy:.0f} %",
        "simulated, s": _number(result.duration_s),
    }


def show(results: Mapping[str, Result], *, title: str, console: Console | None = None) -> None:
    """A column for each result."""
    # Figures that are cut off are none: better a wrapped line.
    console = console or Console(width=max(Console().width, _LEAST_WIDTH))
    table = Table(title_justify="left")
    table.add_column("", no_wrap=True)
    shown = [rows(result) for result in results.values()]
    for name in results:
        table.add_column(name, justify="right", no_wrap=True)
    for figure in shown[0]:
        table.add_row(figure, *(each[figure] for each in shown))
    console.print(title, soft_wrap=True, highlight=False)
    console.print(table)


def show_sweep(points: Sequence[Point], *, title: str, console: Console | None = None) -> None:
    """A row for each load."""
    console = console or Console(width=max(Console().width, _LEAST_WIDTH))
    table = Table(title_justify="left")
    for name in ("load", "offered/s", "goodput/s: admission", "without", "within the SLO, of all",
                 "without", "refused", "TTFT p99 of the served, s", "without"):  # fmt: skip
        table.add_column(name, justify="right", no_wrap=True)
    for point in points:
        ours, all_in = point.admitted, point.everything
        table.add_row(
            f"{point.speed:g}x",
            _number(point.offered),
            _number(ours.goodput),
            _number(all_in.goodput),
            f"{100 * ours.within:.0f} %",
            f"{100 * all_in.within:.0f} %",
            f"{100 * (1 - ours.served / max(1, ours.requests)):.0f} %",
            _number(ours.ttft_s["p99"]),
            _number(all_in.ttft_s["p99"]),
        )
    console.print(title, soft_wrap=True, highlight=False)
    console.print(table)


def write_json(path: Path, results: Mapping[str, Result], *, settings: Mapping[str, Any]) -> None:
    found = {name: result.to_json() for name, result in results.items()}
    text = json.dumps({"settings": dict(settings), "results": found}, indent=1, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def _workers(mean: float, result: Result, role: str) -> str:
    most = result.prefill.workers_most if role == "prefill" else result.decode.workers_most
    return f"{mean:.1f} / {most}"


def _three(values: Mapping[str, float], scale: float = 1.0) -> str:
    return " / ".join(_number(value * scale) for value in values.values())


def _number(value: float) -> str:
    """Three significant digits."""
    if not math.isfinite(value):
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
