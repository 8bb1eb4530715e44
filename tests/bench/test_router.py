"""`penstock bench router` measures what it says, at a small size."""

from __future__ import annotations

import pytest

from bench.router import Plan, run


@pytest.mark.parametrize("workers", [2, 7])
def test_bench_router_measures_every_policy(workers: int) -> None:
    report = run(Plan(workers=workers, prefixes=60, decisions=40, repeats=2))
    rows = report.tables["decisions on one core"]
    assert [row["policy"] for row in rows] == ["cost", "round-robin", "least-load", "block-overlap"]
    assert all(row["decisions_per_s"] > 0 for row in rows)
    assert report.settings["resident_objects"] == 2 * (32 + 1) + 60 * (8 + 1)
    report.to_json()
