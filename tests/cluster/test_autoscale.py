"""Autoscaling is a pure function: what it may never do, and what it does with a load."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.autoscale import (
    AutoscalingSection,
    Memory,
    Signals,
    Target,
    decode_signals,
    prefill_signals,
    target,
)

sections = st.builds(
    lambda least, span, slack, up, down, hold, pause: AutoscalingSection(
        min_replicas=least,
        max_replicas=least + span,
        slack=slack,
        most_up=up,
        most_down=down,
        down_hold_s=hold,
        down_pause_s=pause,
    ),
    st.integers(1, 5),
    st.integers(0, 20),
    st.floats(0.05, 0.9),
    st.integers(1, 6),
    st.integers(1, 3),
    st.sampled_from([0.0, 10.0, 60.0]),
    st.sampled_from([0.0, 5.0, 30.0]),
)
memories = st.builds(
    Memory,
    raised_s=st.sampled_from([-math.inf, 0.0, 99.0]),
    lowered_s=st.sampled_from([-math.inf, 50.0, 99.0]),
    low_since_s=st.sampled_from([None, 10.0, 95.0]),
)
loads = st.lists(st.floats(0, 1e12), min_size=1, max_size=3)
NOW = 100.0


def decide(section: AutoscalingSection, current: int, load: float, memory: Memory) -> Target:
    signals = Signals(current, 0.0, (load,))
    return target(section, current=current, signals=signals, memory=memory, now_s=NOW)


@settings(max_examples=400)
@given(
    section=sections,
    memory=memories,
    loads=loads,
    current=st.integers(0, 40),
    told=st.integers(0, 40),
    age_s=st.sampled_from([0.0, 9.0, 11.0, math.inf]),
)
def test_bounds_and_steps_hold_and_nothing_moves_on_old_or_partial_signals(
    section: AutoscalingSection,
    memory: Memory,
    loads: list[float],
    current: int,
    told: int,
    age_s: float,
) -> None:
    signals = Signals(told, age_s, loads)
    found = target(section, current=current, signals=signals, memory=memory, now_s=NOW)
    assert section.min_replicas <= found.workers <= section.max_replicas
    if not section.min_replicas <= current <= section.max_replicas:
        return
    change = found.workers - current
    assert -section.most_down <= change <= section.most_up
    if age_s > section.stale_s or told < current:
        assert change == 0
    if change > 0:
        assert max(loads) > 1 and memory.raised_s + section.up_pause_s <= NOW
    if change < 0:
        since_s = NOW if memory.low_since_s is None else memory.low_since_s
        assert max(loads) < 1 and since_s + section.down_hold_s <= NOW
        assert max(memory.lowered_s, memory.raised_s) + section.down_pause_s <= NOW
        # Whatever it takes away, the rest is below the target with room to spare.
        assert max(loads) * current / found.workers <= 1 - section.slack + 1e-9


@settings(max_examples=200)
@given(section=sections, memory=memories, current=st.integers(1, 25), data=st.data())
def test_more_load_never_means_fewer_workers(
    section: AutoscalingSection, memory: Memory, current: int, data: st.DataObject
) -> None:
    low, high = sorted(data.draw(st.tuples(st.floats(0, 100), st.floats(0, 100))))
    fewer, more = (decide(section, current, load, memory).workers for load in (low, high))
    assert fewer <= more


@settings(max_examples=60, deadline=None)
@given(section=sections, work=st.floats(0, 30), start=st.integers(1, 25))
def test_a_constant_load_comes_to_rest_where_it_is_served(
    section: AutoscalingSection, work: float, start: int
) -> None:
    """`work`: how many workers' targets it fills."""
    workers, memory, changes = start, Memory(), list[int]()
    for tick in range(700):
        signals = Signals(workers, 0.0, (work / workers,))
        found = target(section, current=workers, signals=signals, memory=memory, now_s=5.0 * tick)
        if found.workers != workers:
            changes.append(found.workers)
        workers, memory = found.workers, found.memory
    assert found.workers == workers
    fits = work / workers <= 1 or workers == section.max_replicas
    assert fits, (work, workers)
    # No back and forth: after the bounds, it goes one way only.
    inside = [max(min(start, section.max_replicas), section.min_replicas), *changes]
    inside = inside[1:] if changes and changes[0] == inside[0] else inside
    ways = {b > a for a, b in itertools.pairwise(inside)}
    assert len(ways) <= 1, inside


def test_a_burst_is_met_at_once_and_left_slowly() -> None:
    section = AutoscalingSection(max_replicas=8, most_up=4, down_hold_s=60, down_pause_s=30)
    workers, memory, seen = 1, Memory(), list[tuple[int, int]]()
    for second in range(600):
        load = (6.0 if 100 <= second < 200 else 0.2) / workers
        signals = Signals(workers, 0.0, (load,))
        found = target(section, current=workers, signals=signals, memory=memory, now_s=second)
        if found.workers != workers:
            seen.append((second, found.workers))
        workers, memory = found.workers, found.memory
    assert seen[:2] == [(100, 5), (105, 6)]
    assert seen[2:] == [(260, 5), (290, 4), (320, 3), (350, 2), (380, 1)]


def test_a_blip_takes_nothing_away() -> None:
    section = AutoscalingSection(max_replicas=8, down_hold_s=60)
    memory, workers = Memory(), 4
    for second in range(0, 600, 5):
        load = 0.9 if second % 50 == 0 else 0.1
        signals = Signals(workers, 0.0, (load,))
        found = target(section, current=workers, signals=signals, memory=memory, now_s=second)
        memory = found.memory
        assert found.workers == 4


def test_signals_of_prefill_are_seconds_of_tokens_in_line_for_the_whole_pool() -> None:
    section = AutoscalingSection(queue_s=2.0)
    signals = prefill_signals(
        section, queued_tokens=[9000, 3000], tokens_per_s=[1000.0, 0.0], age_s=1.0
    )
    # 12,000 tokens over two workers of 1,000 tokens/s; who has not worked yet counts as the others.
    assert signals == Signals(2, 1.0, (3.0,))
    # Nobody has worked yet: nothing is known, nothing moves.
    idle = prefill_signals(section, queued_tokens=[9000], tokens_per_s=[0.0], age_s=0.0)
    assert idle.loads == (0.0,)


def test_signals_of_decode_are_the_gap_and_what_is_asked_for() -> None:
    section = AutoscalingSection(token_gap_ms=50.0, use=0.8)
    signals = decode_signals(section, token_gaps_s=[0.1, 0.0], use=[1.6, 0.0], age_s=0.0)
    assert signals.loads == (pytest.approx(2.0), pytest.approx(1.0))
    assert decode_signals(section, token_gaps_s=[], use=[], age_s=0.0).workers == 0


def test_bounds_that_cross_are_refused_and_changed_ones_are_kept_at_once() -> None:
    with pytest.raises(ValueError, match="must not be below"):
        AutoscalingSection(min_replicas=5, max_replicas=4)
    section = AutoscalingSection(min_replicas=2, max_replicas=4)
    stale = Signals(0, math.inf, ())
    for current, wanted in ((0, 2), (9, 4)):
        found = target(section, current=current, signals=stale, memory=Memory(), now_s=0.0)
        assert (found.workers, found.reason) == (wanted, "bounds")
