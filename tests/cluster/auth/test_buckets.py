"""Token buckets against what they promise, for histories that hypothesis makes up."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cluster.auth.buckets import Bucket

CAPACITY = st.integers(1, 1000)
PERIOD = st.sampled_from([1.0, 60.0, 86_400.0])
STEPS = st.lists(st.tuples(st.floats(0, 100), st.integers(0, 3000)), min_size=1, max_size=40)


@given(CAPACITY, PERIOD, STEPS)
def test_any_window_admits_at_most_a_burst_and_the_refill(
    capacity: int, period_s: float, steps: list[tuple[float, int]]
) -> None:
    bucket, now_s = Bucket.full(capacity, period_s=period_s, now_s=0.0), 0.0
    admitted: list[tuple[float, int]] = []
    for passed_s, cost in steps:
        now_s += passed_s
        if bucket.wait_s(now_s) == 0:
            admitted.append((now_s, cost))
            bucket = bucket.taken(cost, now_s)
    # Whoever is admitted at the end of a window shows that all before it fitted.
    for first in range(len(admitted)):
        spent = 0
        for last in range(first, len(admitted)):
            t_s = admitted[last][0] - admitted[first][0]
            assert spent <= capacity + capacity / period_s * t_s + 1e-6 * (1 + spent)
            spent += admitted[last][1]


@given(CAPACITY, PERIOD, STEPS)
def test_after_the_wait_that_it_tells_there_is_room(
    capacity: int, period_s: float, steps: list[tuple[float, int]]
) -> None:
    bucket, now_s = Bucket.full(capacity, period_s=period_s, now_s=0.0), 0.0
    for passed_s, cost in steps:
        now_s += passed_s
        bucket = bucket.taken(cost, now_s)
        wait_s = bucket.wait_s(now_s)
        assert bucket.wait_s(now_s + wait_s) <= 1e-6 * (1 + wait_s)
        if wait_s > 1e-3:
            assert bucket.wait_s(now_s + wait_s * 0.9) > 0, "it waits longer than it must"


@given(CAPACITY, STEPS)
def test_what_was_charged_too_much_is_given_back(
    capacity: int, steps: list[tuple[float, int]]
) -> None:
    bucket = Bucket.full(capacity, period_s=60.0, now_s=0.0)
    for _, cost in steps:
        bucket = bucket.taken(cost, 0.0)
        assert bucket.level <= capacity
    for _, cost in steps:
        bucket = bucket.taken(-cost, 0.0)
    assert abs(bucket.level - capacity) < 1e-6 * (1 + capacity)


@given(CAPACITY, CAPACITY, st.integers(0, 3000))
def test_a_changed_limit_forgives_nothing(capacity: int, other: int, cost: int) -> None:
    bucket = Bucket.full(capacity, period_s=60.0, now_s=0.0).taken(cost, 0.0)
    resized = bucket.resized(other, period_s=60.0, now_s=0.0)
    assert resized.capacity - resized.level == bucket.capacity - bucket.level


def test_a_clock_that_goes_back_refills_nothing() -> None:
    empty = Bucket.full(10, period_s=10.0, now_s=100.0).taken(10, 100.0)
    assert empty.refilled(50.0).level == 0
    assert empty.refilled(50.0).refilled(101.0).level == 1
