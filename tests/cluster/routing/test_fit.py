"""Coefficients come to what a worker does, whatever pauses, lies and noise come in between."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.policy import Coefficients, pairs
from cluster.routing.fit import NEW, Fit, Rate, coefficients_of

finite = st.floats(allow_nan=False, allow_infinity=False, min_value=-1e12, max_value=1e12)


def trained(draw: random.Random, truth: Coefficients, *, count: int, wild: float) -> Fit:
    """Prompts of many lengths with 10 % noise; a share `wild` takes a hundred times as long."""
    fit = NEW
    for _ in range(count):
        start = draw.choice([0, 0, 0, 8_192, 65_536])
        end = start + draw.randrange(200, 40_000)
        factor = draw.uniform(0.9, 1.1) * (100 if draw.random() < wild else 1)
        fit = fit.read(start, end, truth.compute_s(start, end) * factor)
        batch = draw.randrange(1, 40)
        step_s = (truth.step_s + batch * truth.sequence_s) * draw.uniform(0.9, 1.1)
        fit = fit.drew(50, 50 * step_s * (100 if draw.random() < wild else 1), sequences=batch)
        fit = fit.fetched(1 << 20, (1 << 20) / truth.fetch_bytes_per_s * factor)
    return fit


@settings(max_examples=25, deadline=None)
@given(
    token_s=st.floats(2e-6, 2e-3),
    bend=st.floats(1e-7, 3e-5),
    step_s=st.floats(1e-3, 5e-2),
    sequence_s=st.floats(1e-5, 5e-3),
    seed=st.integers(0, 1000),
)
def test_predictions_come_within_15_percent_in_120_prompts(
    token_s: float, bend: float, step_s: float, sequence_s: float, seed: int
) -> None:
    truth = Coefficients(token_s, token_s * bend, 2e9, step_s, sequence_s)
    fit = trained(random.Random(seed), truth, count=120, wild=0.0)
    for start, end in ((0, 1_000), (0, 30_000), (65_536, 80_000)):
        found = fit.prompts.predict(end - start, pairs(start, end))
        assert found == pytest.approx(truth.compute_s(start, end), rel=0.15)
    for batch in (1, 8, 40):
        assert fit.steps.predict(1, batch) == pytest.approx(
            truth.step_s + batch * truth.sequence_s, rel=0.15
        )
    assert fit.fetch.value == pytest.approx(2e9, rel=0.15)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000))
def test_pauses_of_a_hundred_times_move_predictions_by_less_than_half(seed: int) -> None:
    truth = Coefficients(1e-5, 1e-10, 1e9, 1e-2, 1e-4)
    fit = trained(random.Random(seed), truth, count=200, wild=0.05)
    found = fit.prompts.predict(20_000, pairs(0, 20_000))
    assert found == pytest.approx(truth.compute_s(0, 20_000), rel=0.5)
    assert fit.steps.predict(1, 10) == pytest.approx(0.011, rel=0.5)


def test_a_worker_that_became_ten_times_slower_is_known_within_thirty_prompts() -> None:
    fast, slow = Coefficients(token_s=1e-5), Coefficients(token_s=1e-4)
    fit = trained(random.Random(1), fast, count=200, wild=0.0)
    for _ in range(30):
        fit = fit.read(0, 4_000, slow.compute_s(0, 4_000))
    assert fit.prompts.predict(4_000, pairs(0, 4_000)) > 0.5 * slow.compute_s(0, 4_000)


@given(st.lists(st.tuples(finite, finite, finite), max_size=30))
def test_whatever_is_told_coefficients_stay_finite_and_never_negative(
    told: list[tuple[float, float, float]],
) -> None:
    fit = NEW
    for x, y, seconds in told:
        fit = fit.read(int(x), int(y), seconds).fetched(int(x), seconds)
        fit = fit.drew(int(x), seconds, sequences=y).stayed(seconds)
    # `Coefficients` refuses what is negative.
    found = coefficients_of({"w": fit}, {"w": ["w"]})["w"]
    values = (found.token_s, found.pair_s, found.fetch_bytes_per_s, found.step_s, found.stay_s)
    assert all(math.isfinite(value) for value in values)
    assert found.compute_s(0, 1_000) >= 0


def test_one_observation_moves_little_and_a_newcomer_is_like_its_pool() -> None:
    prior = coefficients_of({}, {"new": ["new"]})["new"]
    assert prior.token_s == Coefficients().token_s
    once = NEW.read(0, 2_048, 1e6)
    assert once.prompts.predict(2_048, pairs(0, 2_048)) < 5 * prior.compute_s(0, 2_048)
    truth = Coefficients(2e-5, 1e-10, 3e9, 5e-3, 1e-4)
    pool = ("a", "b", "new")
    fits = {name: trained(random.Random(i), truth, count=60, wild=0) for i, name in enumerate("ab")}
    found = coefficients_of(fits, {"new": pool})["new"]
    assert found.compute_s(0, 10_000) == pytest.approx(truth.compute_s(0, 10_000), rel=0.2)
    assert found.fetch_bytes_per_s == pytest.approx(3e9, rel=0.2)


def test_a_rate_is_bounded_by_its_prior() -> None:
    rate = Rate(1.0, 1.0)
    for _ in range(2000):
        rate = rate.seen(1e300)
    assert rate.value <= 1e4
