"""A benchmark's result: what was measured on what, as JSON and as tables."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench import machine as where
from penstock.errors import UsageError

SCHEMA = 1
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Report:
    """`tables` maps a title to rows of one shape; `shows_not` names the edges of the claim."""

    bench: str
    settings: Mapping[str, Any]
    tables: Mapping[str, Sequence[Row]]
    shows_not: Sequence[str]
    wall_s: float
    machine: Mapping[str, Any] = field(default_factory=where.machine)
    versions: Mapping[str, str] = field(default_factory=where.versions)
    commit: str = field(default_factory=where.commit)
    command: str = field(default_factory=where.command)
    measured_at: str = field(
        default_factory=lambda: time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    )
    schema: int = SCHEMA

    def to_json(self) -> str:
        """Raises ValueError for nan or infinity: a figure that is not there is null."""
        return json.dumps(asdict(self), indent=1, allow_nan=False)


def check_writable(path: Path | None) -> None:
    """Before a minute of measuring, not after it. Raises UsageError."""
    if path is None:
        return
    try:
        with path.open("a", encoding="utf-8"):
            return
    except OSError as error:
        raise UsageError(f"cannot write the report {path}: {error.strerror}") from error


def publish(report: Report, path: Path | None, console: Console | None = None) -> None:
    """Tables to the terminal, JSON to `path`."""
    console = console or Console()
    for title, rows in report.tables.items():
        console.print(table(title, rows))
    facts = report.machine
    console.print(
        f"{facts['processor']}, {facts['cores']} cores, load {facts['load_average_1min']}; "
        f"commit {report.commit[:12] or '-'}; {report.wall_s:.0f} s"
    )
    for edge in report.shows_not:
        console.print(f"does not show: {edge}")
    if path is not None:
        path.write_text(report.to_json() + "\n", encoding="utf-8")


def table(title: str, rows: Sequence[Row]) -> Table:
    """A line for each figure and a column for each row: figures are many, rows are few. The first
    figure of each row is its heading.
    """
    first, *figures = dict.fromkeys(key for row in rows for key in row)
    shown = Table(title=title, title_justify="left")
    shown.add_column(first.replace("_", " "))
    for row in rows:
        shown.add_column(cell(row[first]), justify="right")
    for figure in figures:
        shown.add_row(figure.replace("_", " "), *(cell(row.get(figure)) for row in rows))
    return shown


def cell(value: object) -> str:
    """Three significant digits; `-` for what was not measured."""
    if value is None:
        return "-"
    if isinstance(value, float):
        if value and abs(value) < 0.001:
            return f"{value:.1e}"
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
