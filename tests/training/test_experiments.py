"""The committed experiments are those that the code would run today."""

from __future__ import annotations

import json
import pathlib

import pytest

from training.experiments.plan import EXPERIMENTS, STEPS, config

RESULTS = pathlib.Path(__file__).parents[2] / "training" / "experiments" / "results"


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_results_belong_to_their_plan(name: str) -> None:
    data = json.loads((RESULTS / f"{name}.json").read_text("ascii"))
    assert data["base"] == config().model_dump(mode="json")
    assert len(data["variants"]) >= 2
    for variant, result in data["variants"].items():
        wanted = dict(EXPERIMENTS[name].variants[variant])
        config(wanted)
        assert result["changes"] == wanted
        assert len(result["losses"]) >= STEPS or result["ended"] != "whole"
    assert (RESULTS / f"{name}.png").read_bytes().startswith(b"\x89PNG")
