"""Arithmetic of `bench.restore`, and where its figures are read."""

from __future__ import annotations

import pytest

from bench.restore import Pair, row, sum_of
from penstock.telemetry import catalog as M
from penstock.telemetry.meters import Meters


def test_a_pair_compares_the_restored_tokens_with_their_share_of_the_computing() -> None:
    pair = Pair(1000, 900, compute_s=10.0, restore_s=0.3, cold_ttft_s=11.0, warm_ttft_s=1.5)
    assert pair.times_faster == pytest.approx(30.0)
    slow = Pair(1000, 900, compute_s=10.0, restore_s=3.0, cold_ttft_s=11.0, warm_ttft_s=4.0)
    figures = row([pair, slow, pair])
    assert figures["n"] == 3 and figures["restored_tokens"] == 900
    assert figures["times_faster"] == pytest.approx(30.0)
    assert figures["times_faster_low"] == pytest.approx(3.0)
    assert figures["restore_ms"] == pytest.approx(300.0)
    assert figures["ttft_times_faster"] == pytest.approx(11 / 1.5)


def test_sums_are_read_from_the_workers_own_exposition() -> None:
    meters = Meters("prefill", {"worker": "a"})
    meters.observe(M.RESTORE_TIME, 0.25)
    meters.observe(M.RESTORE_TIME, 0.5)
    meters.observe(M.CHUNK_TIME, 2.0)
    text = meters.text().decode()
    assert sum_of(text, M.RESTORE_TIME) == 0.75
    assert sum_of(text + text, M.CHUNK_TIME) == 4.0
    assert sum_of("", M.CHUNK_TIME) == 0.0
