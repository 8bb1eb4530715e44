"""`penstock eval` as a user runs it: against a served cluster, its control, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.cli import main

pytest.importorskip("torch")


def shares(path: Path) -> dict[str, dict[str, Any]]:
    data = json.loads(path.read_text())
    return {row["name"]: row for row in data["tables"]["figures"]}


def test_the_shipped_model_passes_a_bounded_evaluation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """22 needles and 24 absent names at 1,024 tokens through HTTP, gate off and on."""
    report, picture = tmp_path / "eval.json", tmp_path / "eval.png"
    flags = (
        f"--lengths 1k --questions 22 --seed 3 --launcher local --json {report} --plot {picture}"
    )
    assert main(["eval", "needle", "ledger", *flags.split()]) == 0
    got = shares(report)
    print({name: (row["hits"], row["n"]) for name, row in got.items()})
    assert got["exact match"]["n"] == 22 and got["exact match"]["hits"] >= 20
    assert got["exact match, gate on"]["hits"] >= 20
    assert got["cited span holds the fact"]["hits"] >= 20
    assert picture.read_bytes().startswith(b"\x89PNG")
    data = json.loads(report.read_text())
    assert len(data["tables"]["depth"]) == 11 and data["settings"]["seed"] == 3
    assert "share [95 % interval] n" in capsys.readouterr().out


def test_a_permuted_head_knows_nothing(tmp_path: Path) -> None:
    """The answer comes from the model's own output: nothing else in the system knows it."""
    report = tmp_path / "control.json"
    flags = (
        f"--lengths 512 --questions 22 --launcher local --no-gate --permuted-head --json {report}"
    )
    assert main(["eval", "needle", "ledger", *flags.split()]) == 0
    got = shares(report)["exact match"]
    assert got["n"] == 22 and got["hits"] == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("needle ledger --lengths 1x", "is no length"),
        ("needle ledger --lengths 100", "from 512"),
        ("needle ledger --lengths 2M", "to 1M"),
        ("needle ledger --url http://127.0.0.1:1 --launcher local", "leave --launcher"),
        ("needle ledger --lengths 1k --url http://127.0.0.1:9", "check --url"),
        ("needle ledger --lengths 1k --json /nowhere/report.json", "cannot write"),
        ("needle ledger --in-process --permuted-head", "has no server"),
        ("hay ledger", "hay"),
    ],
)
def test_wrong_wishes_are_refused_in_one_sentence(
    arguments: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", *arguments.split()]) in (1, 2)
    shown = capsys.readouterr().err
    assert says in shown and "Traceback" not in shown
