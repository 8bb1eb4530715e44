"""`penstock kv trace` on a trace small enough to count by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.cli import main

PROMPTS = [[1, 2, 3], [7, 8], [1, 2, 3, 4], [7, 8, 9]]


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.jsonl"
    rows = [{"input_length": 512 * len(ids), "hash_ids": ids} for ids in PROMPTS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_every_policy_at_every_size(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    assert main(["kv", "trace", str(trace), "--shares", "50,100", "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "never evicts hits 0.4167" in printed
    rows = json.loads(out.read_text())
    assert [(row["policy"], row["percent"]) for row in rows] == [
        ("infinite", 100.0),
        *((name, percent) for percent in (50.0, 100.0) for name in ("reuse", "lru", "s3-fifo")),
    ]
    full = [row for row in rows if row["percent"] == 100.0]
    assert {row["hit_tokens"] for row in full} == {512 * 5}
    assert all(row["evictions"] == 0 for row in full)
    half = [row for row in rows if row["percent"] == 50.0]
    assert all(row["evictions"] > 0 and row["hit_tokens"] < 512 * 5 for row in half)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--policy", "lfu"], "'lfu' is unknown"),
        (["--shares", "0"], "--shares"),
        (["--shares", "ten"], "--shares"),
        (["--bytes-per-token", "0"], "positive"),
    ],
)
def test_what_makes_no_sense_is_one_sentence(
    trace: Path, arguments: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["kv", "trace", str(trace), *arguments]) in (1, 2)
    printed = capsys.readouterr().err
    assert problem in printed and printed.count("\n") == 1


def test_an_empty_trace_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    assert main(["kv", "trace", str(tmp_path / "empty.jsonl")]) == 2
    assert "has no requests" in capsys.readouterr().err
