"""The script that a GPU will run is tried here on a CPU: every op, right, in one report."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from bench import kernels
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
    arguments = ["--device", "cpu", "--backend", "triton", "--tiny", "--no-torch"]
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
    arguments = ["--device", "cpu", "--tiny", "--no-torch", "--only", "hadamard"]
    assert kernels.main(arguments, console=quiet) == 1


def test_full_shapes_are_refused_without_a_gpu() -> None:
    text = io.StringIO()
    assert kernels.main(["--device", "cpu"], console=Console(file=text)) == 2
    assert "use a GPU" in text.getvalue()
