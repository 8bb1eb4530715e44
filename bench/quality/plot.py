"""The heatmap: exact match by depth and length. matplotlib is imported when a picture is asked."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from penstock.errors import UsageError


def drawing(module: str = "matplotlib.figure") -> Any:
    """A module of matplotlib. Raises `UsageError` with the command that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UsageError(
            'pictures need matplotlib, which is not installed; `pip install "penstock[plot]"`'
        ) from error


def length_name(tokens: int) -> str:
    """512, 4k, 1M."""
    for unit, size in (("M", 1 << 20), ("k", 1 << 10)):
        if tokens >= size and tokens % size == 0:
            return f"{tokens // size}{unit}"
    return f"{tokens:,}"


def heatmap(cells: Sequence[Mapping[str, Any]], title: str, path: Path) -> None:
    """Depth downwards, length to the right; every cell says its share and n."""
    lengths = sorted({cell["tokens"] for cell in cells})
    depths = sorted({cell["depth"] for cell in cells})
    shares = {(cell["tokens"], cell["depth"]): cell for cell in cells}
    figure = drawing().Figure(figsize=(2.2 + 1.1 * len(lengths), 5.6), layout="constrained")
    axes = figure.subplots()
    grid = [[shares[n, d]["share"] if (n, d) in shares else float("nan") for n in lengths]
            for d in depths]  # fmt: skip
    image = axes.imshow(grid, vmin=0.0, vmax=1.0, cmap="RdYlGn", aspect="auto")
    for y, depth in enumerate(depths):
        for x, tokens in enumerate(lengths):
            cell = shares.get((tokens, depth))
            if cell is not None:
                label = f"{cell['share']:.2f}\nn {cell['n']}"
                axes.text(x, y, label, ha="center", va="center", fontsize=7)
    axes.set_xticks(range(len(lengths)), [length_name(n) for n in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    axes.set_xlabel("tokens of the document")
    axes.set_ylabel("depth of the fact")
    axes.set_title(title, fontsize=9)
    figure.colorbar(image, ax=axes, label="exact match")
    figure.savefig(path, dpi=120)
