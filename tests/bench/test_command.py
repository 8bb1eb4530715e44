"""`penstock bench` as a user runs it: short real runs, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.cli import main


def test_a_run_against_its_own_cluster_reports_sane_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "serve.json"
    flags = "--launcher local --concurrency 1 --concurrency 2 --seconds 0.5 --max-tokens 16 "
    flags += (
        "--prompt-chars 300 --cached-prompt-chars 2000 --cached-pairs 2 --fake-step-ms 1 --seed 7"
    )
    assert main(["bench", "serve", "--json", str(path), *flags.split()]) == 0
    data = json.loads(path.read_text())
    assert data["bench"] == "serve" and data["settings"]["seed"] == 7
    assert data["settings"]["model"] == "fake" and data["settings"]["startup_s"] > 0
    loads = data["tables"]["load"]
    assert [row["streams"] for row in loads] == [1, 2]
    for row in loads:
        assert row["n_requests"] >= row["streams"] and row["failed"] == 0
        assert 0 < row["ttft_ms_p50"] <= row["ttft_ms_p90"] <= row["ttft_ms_p99"]
        assert 0 <= row["gap_ms_p50"] <= row["gap_ms_p99"]
        assert row["tokens_per_s"] > 0 and row["tokens_per_event"] >= 1
        assert row["tokens_per_s"] == pytest.approx(16 * row["requests_per_s"])
        assert row["prompt_tokens"] > 300
    (pair,) = data["tables"]["prompt seen before"]
    assert pair["n_pairs"] == 2 and pair["cached_tokens_fresh"] == 0
    assert 0 < pair["cached_tokens_again"] <= pair["prompt_tokens"]
    assert pair["ratio"] == pytest.approx(pair["ttft_again_ms"] / pair["ttft_fresh_ms"])
    shown = capsys.readouterr().out
    assert "does not show" in shown and "ttft ms p50" in shown


def test_streams_at_once_are_all_whole(tmp_path: Path) -> None:
    path = tmp_path / "many.json"
    flags = ["--at-once", "40", "--tokens", "40", "--step-ms", "50", "--workers", "2"]
    assert main(["bench", "front", "--json", str(path), *flags]) == 0
    (row,) = json.loads(path.read_text())["tables"]["40 streams at once"]
    assert row["front_held_n"] > row["front_held_steady_n"] > 40
    assert row["front_held_steady_ms_p50_at_most"] <= row["front_held_steady_ms_p99_at_most"]
    assert row["front_held_ms_p50_at_most"] > 0
    assert row["whole"] == 40 and row["dropped"] == 0
    assert 10 < row["front_before_mb"] <= row["front_most_mb"] < 1000
    assert row["front_cpu_ms_a_token"] > 0
    assert 0 <= row["late_ms_p50"] <= row["late_ms_p99"] < row["wall_s"] * 1e3


def test_a_url_where_nobody_answers_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "serve", "--url", "http://127.0.0.1:9"]) == 1
    said = capsys.readouterr().err
    assert "no OpenAI-compatible server answers" in said and said.count("\n") == 1


def test_flags_that_exclude_each_other_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--url", "http://127.0.0.1:9", "--launcher", "local"]
    assert main(["bench", "serve", *flags]) == 2
    assert "leave --launcher and --config out" in capsys.readouterr().err
    absent = str(tmp_path / "absent" / "x.json")
    assert main(["bench", "front", "--json", absent]) == 2
    assert "cannot write the report" in capsys.readouterr().err


def test_benchmarks_import_no_torch() -> None:
    import subprocess
    import sys

    code = (
        "import sys, bench.serve, bench.front, bench.front_case; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_small_run_of_the_store_against_its_own_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (
        ("ENTRIES", 4096),
        ("LOOKUPS", 20),
        ("PIPELINES", 4),
        ("PLAN_TOKENS", 50_000),
    ):
        monkeypatch.setattr(f"bench.store_parts.{name}", value)
    path = tmp_path / "store.json"
    flags = "--block-kib 128 --blocks 4 --repeats 2"
    assert main(["bench", "store", "--json", str(path), *flags.split()]) == 0
    data = json.loads(path.read_text())
    rows = data["tables"]["bytes"]
    assert [row["direction"] for row in rows] == ["put", "get"]
    for row in rows:
        assert row["n"] == 2 and 0 < row["low"] <= row["store_gb_s"] <= row["high"]
        assert row["share_of_tcp"] == pytest.approx(row["store_gb_s"] / row["tcp_gb_s"])
    assert data["tables"]["lookups"][0]["median_ms"] > 0
    (shared,) = data["tables"]["shared memory"]
    assert shared["n"] == 2 and shared["get_gb_s"] > 0 and shared["memcpy_gb_s"] > 0
    (plan,), (overlap,) = data["tables"]["plan"], data["tables"]["overlap"]
    assert plan["total_ms"] > 0 and plan["look_up_ms"] > 0
    assert overlap["chunk_bytes"] == 128 << 10 and 0 < overlap["efficiency"] < 1
    for index in data["tables"]["index"]:
        assert index["mget_p50_ms"] <= index["mget_p99_ms"] and index["bytes_per_entry"] > 64
