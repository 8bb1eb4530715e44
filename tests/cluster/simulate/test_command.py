"""`penstock simulate` as a user runs it, and traces that cannot be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.cli import main
from cluster.simulate.trace import Drawn, draw, open_trace
from penstock.errors import UsageError

GENERATED = "generated:requests=120,rate=20,turns=3,prompt=3000,answer=40,pause=2"


def run(*flags: str) -> int:
    return main(["simulate", *flags])


def test_policies_side_by_side_as_table_json_and_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    as_json, picture = tmp_path / "out.json", tmp_path / "out.png"
    flags = ["--policy", "all", "--store-bytes", "10%", "--prefill", "2", "--decode", "2"]
    assert run(GENERATED, *flags, "--json", str(as_json), "--plot", str(picture)) == 0
    shown = capsys.readouterr().out
    data = json.loads(as_json.read_text())
    names = ["cost", "round-robin", "least-load", "block-overlap", "cost, never evicts"]
    assert list(data["results"]) == names
    for name, result in data["results"].items():
        assert name in shown
        assert result["served"] == 120 and result["goodput"] > 0
        assert 0 < result["ttft_s"]["p50"] <= result["ttft_s"]["p99"]
        assert 0 < result["prefill"]["busy"] < 1 and 0 < result["decode"]["busy"] < 1
    best = data["results"]["cost, never evicts"]
    assert best["evictions"] == 0 < data["results"]["cost"]["evictions"]
    assert best["hit_rate"] > data["results"]["cost"]["hit_rate"]
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 20_000


def test_the_seed_alone_decides(tmp_path: Path) -> None:
    results = []
    for number, seed in enumerate((1, 1, 2)):
        path = tmp_path / f"{number}.json"
        assert run(GENERATED, "--seed", str(seed), "--json", str(path)) == 0
        results.append(json.loads(path.read_text())["results"])
    assert results[0] == results[1] != results[2]


def test_coefficients_come_from_file_and_flags(tmp_path: Path) -> None:
    file, path = tmp_path / "costs.yaml", tmp_path / "out.json"
    file.write_text("decode_step_s: 0.5\nprefill_tokens_per_s: 1000\n")
    flags = ["--costs", str(file), "--set", "prefill_tokens_per_s=2000", "--json", str(path)]
    assert run(GENERATED, "--limit", "5", *flags) == 0
    costs = json.loads(path.read_text())["settings"]["costs"]
    assert (costs["decode_step_s"], costs["prefill_tokens_per_s"]) == (0.5, 2000)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["no-such.jsonl"], "the trace no-such.jsonl cannot be read"),
        (["generated:requests=5,rat=3"], "did you mean 'rate'"),
        (["generated:requests=0"], "greater than or equal to 1"),
        ([GENERATED, "--policy", "best"], "none of cost, round-robin"),
        ([GENERATED, "--model", "flesh"], "did you mean 'flash'"),
        ([GENERATED, "--set", "decode_step=1"], "did you mean 'decode_step_s'"),
        ([GENERATED, "--set", "decode_step_s"], "must be NAME=VALUE"),
        ([GENERATED, "--set", "decode_step_s=-1"], "greater than 0"),
        ([GENERATED, "--store-bytes", "much"], "a size as 30GB"),
        ([GENERATED, "--store-bytes", "nan%"], "a size as 30GB"),
        ([GENERATED, "--shrink", "3"], "does not divide"),
        ([GENERATED, "--eviction", "fifo"], "none of reuse"),
        ([GENERATED, "--json", "/no/such/place.json"], "cannot write"),
    ],
)
def test_what_cannot_be_is_one_sentence(
    flags: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*flags) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        '{"timestamp": 0, "input_length": 5, "hash_ids": []}',
        '{"timestamp": "x", "input_length": 5, "output_length": 1, "hash_ids": []}',
        '{"timestamp": 0, "input_length": 0, "output_length": 1, "hash_ids": []}',
        '{"timestamp": NaN, "input_length": 5, "output_length": 1, "hash_ids": []}',
        '{"timestamp": 0, "input_length": 5, "output_length": 1, "hash_ids": [-4]}',
    ],
)
def test_a_damaged_trace_names_its_line(tmp_path: Path, line: str) -> None:
    good = '{"timestamp": 7, "input_length": 600, "output_length": 0, "hash_ids": [3, 4]}'
    path = tmp_path / "trace.jsonl"
    path.write_text(f"{good}\n\n{line}\n")
    with pytest.raises(UsageError, match="line 3 of"):
        open_trace(str(path), seed=0)
    path.write_text(good)
    (request,) = open_trace(str(path), seed=0).requests
    # An answer has a token at least; a block that is not full has no id.
    assert (request.arrival_s, request.output_tokens, len(request.blocks)) == (0.0, 1, 1)


def test_a_drawn_trace_has_the_rate_length_and_turns_that_were_asked_for() -> None:
    trace = draw(Drawn(requests=4000, rate=20, prompt=1000, answer=100, turns=1), seed=3)
    assert trace.duration_s == pytest.approx(200, rel=0.1)
    assert trace.prompt_tokens / 4000 == pytest.approx(1000, rel=0.1)
    turns = draw(Drawn(requests=400, rate=20, prompt=4000, answer=100, turns=4), seed=3)
    by_first: dict[bytes, list[int]] = {}
    for request in turns.requests:
        if request.blocks:
            by_first.setdefault(request.blocks[0], []).append(request.prompt_tokens)
    # Each turn's prompt is longer than the one before and begins with its blocks.
    assert all(lengths == sorted(lengths) for lengths in by_first.values())
    assert max(len(lengths) for lengths in by_first.values()) == 4
    day = draw(Drawn(requests=4000, rate=20, period=200, burst=1), seed=3)
    halves = [sum(1 for r in day.requests if low <= r.arrival_s < low + 50) for low in (0, 75)]
    assert halves[1] > 1.5 * halves[0]


def test_overload_and_scaling_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    as_json, picture = tmp_path / "out.json", tmp_path / "out.png"
    files = ["--json", str(as_json), "--plot", str(picture)]
    assert run(GENERATED, "--overload", "1,4", *files) == 0
    rows = json.loads(as_json.read_text())
    assert [row["speed"] for row in rows] == [1, 4] and "goodput/s" in capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")
    scaled = ["--autoscale-decode", "min_replicas=2,max_replicas=3", "--start-s", "1"]
    assert run(GENERATED, *scaled, *files) == 0
    (result,) = json.loads(as_json.read_text())["results"].values()
    # One worker was given; the bounds hold from the first look on.
    assert result["workers_over_time"][0][2] == 1
    assert 2 <= result["decode"]["workers_most"] <= 3
    assert run(GENERATED, "--overload", "1,x") == 2
    assert run(GENERATED, "--autoscale-prefill", "min_replica=2") == 2
    assert "did you mean 'min_replicas'" in capsys.readouterr().err
