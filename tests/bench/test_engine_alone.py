"""`penstock bench engine --alone`: a short real run beside transformers, and its arithmetic."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.engine_case import Case
from bench.engine_compare import growth, measure, row
from cluster.cli import main
from penstock.folder import model_folder


def test_a_tiny_run_beside_transformers_agrees_with_it(tmp_path: Path) -> None:
    path = tmp_path / "engine.json"
    flags = "--alone --against transformers --length 96 --repeats 2 --tokens 4"
    assert main(["bench", "engine", "--json", str(path), *flags.split()]) == 0
    data = json.loads(path.read_text())
    (figures,) = data["tables"]["engine alone: ledger"]
    assert figures["prompt_tokens"] == 96 and figures["n"] == figures["transformers_n"] == 2
    for key in ("prefill_tokens_per_s", "decode_ms", "transformers_decode_ms"):
        assert figures[key] > 0
    assert figures["worst_logit_difference"] < 1e-4
    assert figures["fast_worst_logit_difference"] < 1e-4
    assert 0 < figures["loaded_mib"] <= figures["peak_mib"]


def test_ratios_and_growth_are_what_they_say() -> None:
    def case(prefill: float, decode: float, logit: float) -> dict[str, object]:
        return {
            "prefill_cpu_s": [prefill, 9.0, 0.0],
            "decode_cpu_s": [decode],
            "logits": [logit, 0.0],
            "peak_mib": 300.0,
            "loaded_mib": 200.0,
        }

    short = row(100, case(2.0, 0.01, 1.0), case(1.0, 0.01, 1.5), case(8.0, 0.04, 1.25))
    long = row(400, case(6.0, 0.02, 1.0), case(6.0, 0.02, 1.0), None)
    assert short["prefill_tokens_per_s"] == 50 and short["exact_by_fast_prefill"] == 2
    assert short["prefill_times_faster"] == 4 and short["decode_times_faster"] == 4
    assert short["fast_worst_logit_difference"] == 0.5 and short["worst_logit_difference"] == 0.25
    assert long["transformers_decode_ms"] is None
    assert [r["prefill_time_times"] for r in growth([short, long])] == [1, 3]
    assert growth([short, long])[1]["times_longer"] == 4


def test_logits_are_those_of_the_first_prompt_however_many_follow(tmp_path: Path) -> None:
    """Found in a run where one side had time for more prompts: other prompts were compared."""
    found = []
    for repeats in (1, 3):
        case = Case(
            side="ours",
            folder=str(model_folder("ledger")),
            tokens=20,
            repeats=repeats,
            steps=1,
            numerics="exact",
            kv="fp32",
            chunk=16,
            budget_s=60.0,
            seed=5,
        )
        found.append(measure(case))
    assert len(found[1]["prefill_cpu_s"]) == 3
    assert found[0]["logits"] == found[1]["logits"]


def test_flags_of_another_measurement_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "engine", "--against", "transformers"]) == 2
    assert "add --alone" in capsys.readouterr().err
    assert main(["bench", "engine", "--alone", "--against", "vllm"]) == 2
    assert "only transformers is known" in capsys.readouterr().err
