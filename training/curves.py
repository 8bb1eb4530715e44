"""What a run shows: a progress bar, and its curve as JSON and PNG."""

from __future__ import annotations

import importlib
import json
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from training.config import TrainingConfig


class Sink:
    """Of one run. The curve is always written; the bar only where `bar` asks and a terminal is."""

    def __init__(self, out: pathlib.Path, *, bar: bool = False) -> None:
        self._out = out
        self._bar: Progress | None = None
        if bar:
            self._bar = Progress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
                TextColumn("{task.fields[speed]:,.0f} tokens/s"), TextColumn("ETA"),
                TimeRemainingColumn(),
            )  # fmt: skip
            self._bar.start()
            self._task = self._bar.add_task("training", total=None, speed=0.0)
        self._began_s, self._began_tokens = time.monotonic(), -1

    def step(self, cfg: TrainingConfig, total: int, tokens: int, stage: str) -> None:
        """One step is done."""
        if self._bar is None:
            return
        if self._began_tokens < 0:
            self._began_s, self._began_tokens = time.monotonic(), tokens
        passed = max(1e-9, time.monotonic() - self._began_s)
        self._bar.update(
            self._task, completed=total, total=sum(stage.steps for stage in cfg.stages),
            description=f"stage {stage}", speed=(tokens - self._began_tokens) / passed,
        )  # fmt: skip

    def curve(self, curve: Sequence[Mapping[str, Any]]) -> None:
        """`curve.json`, and `curve.png` where matplotlib is installed (the extra `plot`)."""
        (self._out / "curve.json").write_text(json.dumps(list(curve), indent=0) + "\n", "ascii")
        if curve:
            draw(
                {"loss": [(line["tokens"], line["loss"]) for line in curve],
                 "exact match": [(line["tokens"], line["em"]) for line in curve],
                 "gold attention": [(line["tokens"], line["gold_mass"]) for line in curve]},
                self._out / "curve.png", x="training tokens", y="",
            )  # fmt: skip

    def close(self) -> None:
        """The bar ends."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def draw(
    lines: Mapping[str, Sequence[tuple[float, float]]], path: pathlib.Path, *, x: str, y: str,
    title: str = "", log: bool = False,
) -> bool:  # fmt: skip
    """Lines of (x, y) as a PNG; False where matplotlib is not installed."""
    try:
        figures = importlib.import_module("matplotlib.figure")
    except ImportError:
        return False
    figure = figures.Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.subplots()
    for name, points in lines.items():
        axes.plot([a for a, _ in points], [b for _, b in points], label=name)
    if log:
        axes.set_yscale("log")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(title, fontsize=9)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    return True
