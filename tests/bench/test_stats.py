"""Percentiles against numpy, an independent oracle, and the figures made of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.stats import finite, gaps, low_median_high, percentile, ratio, spread

FLOATS = st.floats(-1e6, 1e6)


@given(st.lists(FLOATS, min_size=1, max_size=50), st.floats(0, 100))
def test_percentile_is_numpys(values: list[float], q: float) -> None:
    assert percentile(values, q) == pytest.approx(float(np.percentile(values, q)), abs=1e-6)


def test_percentile_of_nothing_is_nan_and_never_a_number_that_was_not_measured() -> None:
    assert math.isnan(percentile([], 50))
    assert spread([], "x") == {"x_p50": None, "x_p90": None, "x_p99": None}


@pytest.mark.parametrize("q", [-1.0, 100.5, math.nan])
def test_percentile_refuses_what_is_none(q: float) -> None:
    with pytest.raises(ValueError, match=r"0\.\.100"):
        percentile([1.0], q)


def test_spread_scales_and_names() -> None:
    found = spread([0.001, 0.002, 0.003], "ttft_ms", scale=1e3)
    assert found["ttft_ms_p50"] == pytest.approx(2.0)
    assert set(found) == {"ttft_ms_p50", "ttft_ms_p90", "ttft_ms_p99"}


def test_ratio_without_a_whole_is_absent() -> None:
    assert ratio(1.0, 4.0) == 0.25
    assert ratio(1.0, 0.0) is None
    assert ratio(None, 1.0) is None
    assert finite(math.inf) is None


def test_gaps_and_extremes() -> None:
    assert gaps([1.0, 3.0, 6.0]) == [2.0, 3.0]
    assert gaps([1.0]) == []
    assert low_median_high([3.0, 1.0, 2.0]) == (1.0, 2.0, 3.0)
    with pytest.raises(ValueError, match="no values"):
        low_median_high([])
