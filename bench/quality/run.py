"""`penstock eval`: sheets are asked, marks become figures, figures a table, JSON and a picture."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from bench.quality import marks, plot, served, sheets
from bench.quality.plot import length_name
from bench.report import Report
from cluster.config import ClusterConfig
from penstock.errors import UsageError
from penstock.tokenizer import Tokenizer, open_tokenizer

_SHOWS_NOT = (
    "other tasks: every question asks for four digits that stand in the document in one sentence",
    "names that were trained on: all names here are held out",
)


@dataclass(frozen=True)
class Plan:
    """What is asked. `questions` is the least number behind each figure of each length."""

    suite: str
    lengths: tuple[int, ...]
    questions: int = 110
    seed: int = 1
    gate: bool = True
    permuted_head: bool = False
    """A control: the answers must come from the weights, so this model must know nothing."""


def run(
    plan: Plan, *, config: ClusterConfig | None, url: str | None, model: str, key: str | None,
    json_path: Path | None, plot_path: Path | None,
) -> int:  # fmt: skip
    """Asks `url`, or a cluster of `config` that is started and stopped. Exactly one is given."""
    if plot_path is not None:
        plot.drawing()
    tokenizer = open_tokenizer(model)
    if tokenizer is None:
        raise UsageError(f"the model '{model}' has no tokenizer.json, which measures documents")
    began_s = time.monotonic()
    console = Console()
    collected = _Collected(plan, model, json_path, plot_path, began_s)
    with _server(config, url, plan) as base, _progress(console) as progress:
        name = config.served_name if config is not None else model
        for tokens in plan.lengths:
            asyncio.run(_one_length(plan, tokens, base, name, key, tokenizer, progress, collected))
    for line in collected.report().tables["figures"]:
        if line["n"] == 0:
            console.print(f"nothing was asked for {line['name']}")
    console.print(table(marks.figures(collected.marks)))
    collected.save()
    return 0


async def _one_length(
    plan: Plan, tokens: int, url: str, model: str, key: str | None, tokenizer: Tokenizer,
    progress: Progress, collected: _Collected,
) -> None:  # fmt: skip
    def count(text: str) -> int:
        return len(tokenizer.encode(text))

    task = progress.add_task(length_name(tokens), total=None)
    asked = 0

    def on_sheet(sheet: sheets.Sheet) -> None:
        nonlocal asked
        asked += len(sheet.questions)
        progress.update(task, total=asked, right="")

    def on_mark(mark: marks.Mark) -> None:
        collected.marks.append(mark)
        progress.update(task, advance=1, right=f"{sum(m.right for m in collected.marks)} right")
        collected.save_now_and_then()

    await served.ask_all(
        url, sheets.sheets(plan.suite, tokens, plan.questions, plan.seed, count), model=model,
        key=key, gate=plan.gate, on_sheet=on_sheet, on_mark=on_mark,
    )  # fmt: skip
    progress.update(task, total=asked)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:>6}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("{task.fields[right]}"), TimeElapsedColumn(), console=console,
        disable=not console.is_terminal,
    )  # fmt: skip


class _Collected:
    """Marks of a run. What is there is saved every minute: a long run may be stopped."""

    def __init__(
        self, plan: Plan, model: str, json_path: Path | None, plot_path: Path | None, began_s: float
    ) -> None:
        self.marks: list[marks.Mark] = []
        self._plan, self._model, self._began_s = plan, model, began_s
        self._json, self._plot, self._saved_s = json_path, plot_path, began_s

    def report(self) -> Report:
        cells = marks.grid(self.marks)
        worst = [marks.worst_cell(cells, tokens) for tokens in self._plan.lengths]
        wrong = [
            {"tokens": m.tokens, "kind": m.kind.value, "expected": m.expected, "answer": m.answer,
             "gated": m.gated, "depth": m.depth, "facts": m.facts}
            for m in self.marks if not m.right
        ]  # fmt: skip
        tables: dict[str, Sequence[dict[str, Any]]] = {
            "figures": [figure.row() for figure in marks.figures(self.marks)],
            "depth": cells,
            "worst depth": [line for line in worst if line is not None],
            "wrong": wrong,
        }
        return Report(
            bench="quality", settings=asdict(self._plan) | {"model": Path(self._model).name},
            tables=tables, shows_not=_SHOWS_NOT, wall_s=time.monotonic() - self._began_s,
        )  # fmt: skip

    def save_now_and_then(self) -> None:
        if time.monotonic() - self._saved_s > 60:
            self.save()

    def save(self) -> None:
        self._saved_s = time.monotonic()
        report = self.report()
        if self._json is not None:
            half = self._json.with_suffix(self._json.suffix + ".part")
            half.write_text(report.to_json() + "\n", encoding="utf-8")
            half.replace(self._json)
        if self._plot is not None and report.tables["depth"]:
            title = f"{report.settings['model']}: exact match, seed {self._plan.seed}"
            plot.heatmap(report.tables["depth"], title, self._plot)


@contextlib.contextmanager
def _server(config: ClusterConfig | None, url: str | None, plan: Plan) -> Iterator[str]:
    if config is None:
        yield url or ""
        return
    from cluster.launch import started

    with contextlib.ExitStack() as stack:
        if plan.permuted_head:
            from bench.quality.control import permuted_head

            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            permuted_head(config.model.model, folder, seed=plan.seed)
            model = config.model.model_copy(update={"model": str(folder)})
            config = config.model_copy(update={"model": model})
        yield stack.enter_context(started(config)).url


def table(figures: Sequence[marks.Figure]) -> Table:
    """A line for each figure, a column for each length: share, interval, n."""
    lengths = sorted({figure.tokens for figure in figures})
    shown = Table(title="share [95 % interval] n", title_justify="left")
    shown.add_column("figure")
    for tokens in lengths:
        shown.add_column(length_name(tokens), justify="right")
    cells = {(figure.name, figure.tokens): figure.row() for figure in figures}
    for name in dict.fromkeys(figure.name for figure in figures):
        rows = [cells.get((name, tokens)) for tokens in lengths]
        shown.add_row(name, *(
            "-" if row is None
            else f"{row['share']:.3f} [{row['low']:.3f}, {row['high']:.3f}] {row['n']}"
            for row in rows
        ))  # fmt: skip
    return shown
