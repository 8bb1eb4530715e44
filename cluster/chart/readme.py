"""The chart's README: prose from `README.md.in`, the table of values from `values.yaml` itself."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

_MARK = "<!-- values -->"
_HEAD = "<!-- Made by `make helm` from README.md.in and values.yaml; edit those. -->\n\n"


@dataclass(frozen=True)
class Row:
    """One value with its default as JSON and what its comment says."""

    name: str
    default: str
    comment: str


def readme(chart: Path) -> str:
    text = (chart / "README.md.in").read_text()
    table = ["| value | default | what |", "|---|---|---|"]
    for row in rows_of((chart / "values.yaml").read_text()):
        name, default, what = (
            part.replace("|", "\\|") for part in (row.name, row.default, row.comment)
        )
        table.append(f"| `{name}` | `{default}` | {what} |")
    return _HEAD + text.replace(_MARK, "\n".join(table))


def rows_of(text: str) -> Iterator[Row]:
    """Every value with the comment above its key. A key without one takes what was said of the same
    key of an earlier role (`head.shmSize`, `decode.shmSize`), else what is said of its own block.
    """
    lines = text.splitlines()
    said: dict[str, str] = {}
    for name, default, blocks in _leaves(yaml.compose(text)):
        within = name.partition(".")[2]
        comment = _above(lines, blocks[-1]) or said.get(within, "")
        if not comment and len(blocks) > 1:
            comment = _above(lines, blocks[-2])
        if within:
            said.setdefault(within, comment)
        yield Row(name, json.dumps(default), comment)


def _above(lines: Sequence[str], at: int) -> str:
    """The comment that ends just above line `at`."""
    start = at
    while start > 0 and lines[start - 1].lstrip().startswith("#"):
        start -= 1
    return " ".join(line.strip().lstrip("# ") for line in lines[start:at])


def _leaves(
    node: Any, prefix: str = "", above: tuple[int, ...] = ()
) -> Iterator[tuple[str, Any, tuple[int, ...]]]:
    """Name, value, lines of its blocks and of its own key. `{...}` on one line is one value."""
    for key, value in node.value:
        name, blocks = f"{prefix}{key.value}", (*above, key.start_mark.line)
        if isinstance(value, yaml.MappingNode) and value.value and not value.flow_style:
            yield from _leaves(value, f"{name}.", blocks)
        else:
            yield name, yaml.safe_load(yaml.serialize(value)), blocks
