"""The script that a GPU will run is tried here on a CPU: every op, right, in one report."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from bench import kernels, kernels_ledger, kernels_stack
from bench.kernels import CASES
from kernels.device import ReferenceDeviceOps
from tests.kernels.triton import shim


@pytest.fixture
def interpreter() -> None:
    shim.install()


@pytest.mark.usefixtures("interpreter")
@pytest.mark.slow
def test_every_case_is_right_in_the_interpreter_and_in_one_report(tmp_path: Path) -> None:
    path, text = tmp_path / "kernels.json", io.StringIO()
    arguments = ["--device", "cpu", "--backend", "triton", "--tiny", "--no-torch", "--parts", "ops"]
    code = kernels.main([*arguments, "--json", str(path)], console=Console(file=text, width=240))
    data = json.loads(path.read_text())
    rows = {row["op"]: row for row in data["tables"]["ops"]}
    assert [name for name, row in rows.items() if not row["right"]] == [], rows
    assert code == 0
    assert list(rows) == [case.name for case in CASES]
    assert data["settings"]["backend"] == "triton-1"
    assert data["machine"]["device"] == "cpu"
    assert data["versions"]["torch"] and data["versions"]["triton"] and data["commit"]
    assert all(row["us"] > 0 and row["of_ceiling"] != 0 for row in rows.values())
    assert all(name.split(",")[0] in text.getvalue() for name in rows)


class Wrong(ReferenceDeviceOps):
    """Forgets to divide by the root of the channels."""

    @staticmethod
    def hadamard(x_RC, matrix_CC):  # type: ignore[no-untyped-def,override]
        return x_RC @ matrix_CC


def test_a_wrong_op_fails_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "load_device", lambda device, backend: Wrong())
    quiet = Console(quiet=True)
    arguments = ["--device", "cpu", "--tiny", "--no-torch", "--parts", "ops", "--only", "hadamard"]
    assert kernels.main(arguments, console=quiet) == 1


def test_a_stack_of_layers_and_its_promises_in_one_report(tmp_path: Path) -> None:
    """The reference ops on a CPU; the full plan is Flash's shape with four layers of each kind."""
    path = tmp_path / "stack.json"
    arguments = ["--device", "cpu", "--backend", "reference", "--tiny", "--parts", "stack"]
    code = kernels.main([*arguments, "--json", str(path)], console=Console(quiet=True))
    tables = json.loads(path.read_text())["tables"]
    assert code == 0
    assert [(row["class"], row["context"]) for row in tables["stack"]] == [
        (numerics, context) for numerics in ("fast", "exact") for context in (300, 600)
    ]
    for row in tables["stack"]:
        figures = [value for name, value in row.items() if name != "class"]
        assert all(value > 0 for value in figures), row
    promises = tables["promises of class exact"]
    assert len(promises) == 4 and all(row["same_bits"] for row in promises)
    full = kernels_stack.StackPlan.full()
    assert full.config.ratios.count(4) == full.config.ratios.count(128) == 4
    assert full.contexts[-1] + 200 < full.config.max_positions == 1 << 20


def test_a_broken_promise_or_a_wrong_answer_fails_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--device", "cpu", "--tiny", "--parts"]
    quiet = Console(quiet=True)
    broken = [{"exact": "in chunks", "same_bits": False}]
    monkeypatch.setattr(kernels_stack, "run", lambda *args, **kwargs: ([{"context": 1}], broken))
    assert kernels.main([*arguments, "stack"], console=quiet) == 1
    rows = [{"model": "ledger", "right": 1, "questions": 3}]
    monkeypatch.setattr(kernels_ledger, "run", lambda *args, **kwargs: rows)
    assert kernels.main([*arguments, "ledger"], console=quiet) == 1
    rows[0]["right"] = 3
    assert kernels.main([*arguments, "ledger"], console=quiet) == 0


@pytest.mark.slow
def test_ledger_answers_through_separate_workers() -> None:
    (row,) = kernels_ledger.run("cpu", tokens=600, questions=2)
    assert row["right"] == row["questions"] == 2
    assert row["separate_processes"] and row["decode_computed_prompt_tokens"] == 0


def test_full_shapes_are_refused_without_a_gpu() -> None:
    text = io.StringIO()
    assert kernels.main(["--device", "cpu"], console=Console(file=text)) == 2
    assert "use a GPU" in text.getvalue()
