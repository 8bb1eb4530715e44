"""A report is valid JSON with everything a reader needs to judge it; tables show all figures."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from rich.console import Console

from bench import evidence
from bench.client import Answer
from bench.drafts import acceptance, draft_counts
from bench.engine import speed_row
from bench.front import cases, way_row
from bench.front_case import Sample
from bench.report import Report, cell, check_writable, publish, table
from bench.serve import load_row
from bench.store import layout as store_layout
from bench.store import rate_rows
from penstock.errors import UsageError

ROWS = [{"way": "a", "n": 3, "cost_ms": 1.2345}, {"way": "b", "n": 3, "cost_ms": None}]


def report(**tables: list[dict[str, object]]) -> Report:
    return Report(bench="x", settings={}, tables=tables, shows_not=("everything else",), wall_s=1.0)


def test_a_report_names_machine_versions_commit_and_command(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    publish(report(first=ROWS), path, Console(quiet=True))
    data = json.loads(path.read_text())
    for key in ("machine", "versions", "commit", "command", "measured_at", "schema", "shows_not"):
        assert data[key], key
    assert data["machine"]["processor"] and data["machine"]["cores"] >= 1
    assert data["versions"]["python"]
    assert data["tables"]["first"] == ROWS


def test_a_figure_that_is_not_there_cannot_be_written_as_nan() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        report(first=[{"way": "a", "cost_ms": math.nan}]).to_json()


def test_a_file_that_cannot_be_written_is_refused_before_measuring(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot write the report"):
        check_writable(tmp_path / "absent" / "x.json")
    check_writable(tmp_path / "x.json")
    check_writable(None)


def test_a_table_has_a_column_for_each_row_and_a_line_for_each_figure() -> None:
    shown = table("title", ROWS)
    assert [str(c.header) for c in shown.columns] == ["way", "a", "b"]
    assert [list(c.cells) for c in shown.columns] == [
        ["n", "cost ms"],
        ["3", "1.23"],
        ["3", "-"],
    ]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "-"),
        (0.0, "0"),
        (1234.5, "1,234"),
        (0.25, "0.25"),
        (2e-5, "2.0e-05"),
        (12345, "12,345"),
    ],
)
def test_cells_have_three_digits(value: object, shown: str) -> None:
    assert cell(value) == shown


def test_load_figures_of_known_answers() -> None:
    answers = [
        Answer(10.0, [10.5, 10.6, 10.8], 10.8, prompt_tokens=7, completion_tokens=6),
        Answer(10.0, [10.3, 10.4, 10.5], 10.5, prompt_tokens=7, completion_tokens=6),
    ]
    row = load_row(2, answers, 1, took_s=2.0)
    assert row["n_requests"] == 2 and row["failed"] == 1 and row["prompt_tokens"] == 7
    assert row["ttft_ms_p50"] == pytest.approx(400.0)
    assert row["gap_ms_p50"] == pytest.approx(100.0)
    assert row["tokens_per_s"] == pytest.approx(6.0)
    assert row["requests_per_s"] == pytest.approx(1.0)
    assert row["tokens_per_event"] == pytest.approx(2.0)


def test_load_figures_without_an_answer_are_absent_not_zero() -> None:
    row = load_row(1, [], 3, took_s=1.0)
    assert row["ttft_ms_p50"] is None and row["prompt_tokens"] is None and row["failed"] == 3


def test_cost_is_cpu_per_thousand_tokens_of_the_whole_way_out() -> None:
    def sample(front_s: float, proxy_s: float) -> Sample:
        cpu = {"front": front_s, "proxy": proxy_s, "decode": 0.0, "rest": 0.0}
        return Sample(2000, 1000, 4.0, cpu, 0.1, [0.01, 0.03], [0.5])

    first = way_row("alone", [sample(0.4, 0.0)], None)
    second = way_row("proxied", [sample(0.4, 0.4)] * 3, first)
    assert first["front_cpu_ms"] == pytest.approx(200.0)
    assert (first["ratio"], second["ratio"]) == (1.0, pytest.approx(2.0))
    assert (second["n"], second["tokens_per_event"]) == (3, 2.0)
    assert second["tokens_per_s"] == pytest.approx(500.0)


def test_each_load_goes_every_way() -> None:
    plan = cases(streams=4, tokens=10, repeats=2, step_ms=5.0)
    assert len(plan) == 4 and len({load for load, _ in plan}) == 2
    assert {case.launcher for _, case in plan} == {"local", "ray"}
    assert {case.decode_step_ms for _, case in plan} == {0.0, 5.0}


def test_store_rates_and_their_share_of_plain_tcp() -> None:
    rounds = {"put": [1.0, 2.0, 4.0], "tcp put": [0.5] * 3, "get": [1.0] * 3, "tcp get": [1.0] * 3}
    put, get = rate_rows(rounds, 1_000_000_000)
    assert (put["store_gb_s"], put["low"], put["high"]) == (0.5, 0.25, 1.0)
    assert put["share_of_tcp"] == pytest.approx(0.25) and get["share_of_tcp"] == 1.0


def test_a_benchmarks_block_has_about_the_size_asked_for() -> None:
    assert store_layout(1 << 20).block_bytes == 1 << 20
    assert store_layout(1).block_bytes > 0


def test_model_speed_counts_only_computed_prompt_tokens() -> None:
    answer = Answer(0.0, [2.0, 2.5], 3.0, prompt_tokens=100, cached_tokens=20, completion_tokens=11)
    row = speed_row([answer])
    assert row["prefill_tokens_per_s"] == pytest.approx(40.0)
    assert row["decode_ms_per_token_p50"] == pytest.approx(100.0)


def test_acceptance_is_read_from_our_metrics_and_from_vllms() -> None:
    ours = "\n".join(
        f'penstock_worker_spec_decode_num_{name}_total{{role="decode",worker="{worker}"}} {value}'
        for worker in ("decode-0", "decode-1")
        for name, value in (("drafts", 10.0), ("draft_tokens", 40.0), ("accepted_tokens", 25.0))
    )
    ours += '\npenstock_worker_spec_decode_num_accepted_tokens_per_pos_0_total{role="decode"} 9.0\n'
    after = draft_counts(ours)
    assert after == {"drafts": 20, "draft_tokens": 80, "accepted_tokens": 50}
    (row,) = acceptance({"drafts": 10, "draft_tokens": 40, "accepted_tokens": 30}, after)
    assert (row["drafts"], row["draft_tokens"], row["accepted_tokens"]) == (10, 40, 20)
    assert (row["acceptance_rate"], row["tokens_per_drafted_step"]) == (0.5, 3.0)
    theirs = 'vllm:spec_decode_num_drafts_total{engine="0"} 3.0\n'
    assert draft_counts(theirs) == {"drafts": 3}
    assert acceptance({}, draft_counts("penstock_requests_total 5.0\n")) == []


def test_the_cost_of_evidence_is_the_median_of_the_pairs_ratios() -> None:
    answer = Answer(0.0, prompt_tokens=100, completion_tokens=50, evidence_spans=25)
    off = [evidence.Turn(0.002, 0.003), evidence.Turn(0.004, 0.003), evidence.Turn(0.002, 0.003)]
    on = [evidence.Turn(0.0022, 0.0033), evidence.Turn(0.004, 0.003), evidence.Turn(0.0021, 0.003)]
    row = evidence.row(answer, off, on)
    assert row["n_pairs"] == 3 and row["spans_per_token"] == 0.5
    assert row["ratio"] == pytest.approx(1.05)
    assert row["decode_ms_per_token"] == pytest.approx(2.0)
    assert row["cpu_ms_per_1000_tokens"] == pytest.approx(3000)
    assert row["cpu_ratio"] == pytest.approx(9.3 / 9)
    # A clock too coarse for so little gives no figure, and no division by zero.
    assert evidence.row(answer, [evidence.Turn(0.002, 0.0)], [off[0]])["cpu_ratio"] is None
