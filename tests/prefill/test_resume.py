"""The resume rule: every way offered is possible, the choice is the predicted best within its
margin, and what is learnt converges and stays bounded.
"""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from model.fake import LAYOUT
from prefill.resume import (
    LEAST_GAIN_S,
    LEAST_GAIN_SHARE,
    NOTHING,
    Costs,
    Kind,
    Line,
    choose,
    ways,
)

MODEL = st.tuples(st.floats(1e-6, 1e-1), st.floats(1e-12, 1e-7))
NETWORK = st.tuples(st.floats(1e-4, 1.0), st.floats(1e-11, 1e-5))


def trained(model: tuple[float, float], network: tuple[float, float], rounds: int = 60) -> Costs:
    costs = Costs()
    for number in range(rounds):
        start, tokens = number * 7919 % 400_000, 64 + number * 97 % 4000
        costs.computed(start, tokens, tokens * (model[0] + model[1] * (start + tokens / 2)))
        size = 1 << (10 + number % 18)
        costs.fetched(size, network[0] + network[1] * size)
    return costs


@given(
    length=st.integers(1, 40_000),
    states=st.lists(st.integers(0, 45_000), max_size=30),
    blocks=st.integers(0, 180),
    replay=st.sampled_from([0, 128, 5504]),
    model=MODEL,
    network=NETWORK,
)
def test_the_choice_is_possible_and_the_best_within_its_margin(
    length: int,
    states: list[int],
    blocks: int,
    replay: int,
    model: tuple[float, float],
    network: tuple[float, float],
) -> None:
    found = ways(length, states, blocks=blocks, layout=LAYOUT, replay_tokens=replay)
    assert NOTHING in found
    for way in found:
        assert 0 <= way.start <= way.position <= length
        assert way.position // 256 <= blocks or way is NOTHING
        if way.kind is Kind.STATE:
            assert way.position in states
        if way.kind is Kind.REPLAY:
            assert way.replayed >= replay > 0
            assert way.position % 256 == 0
            assert way.start % 128 == 0
    costs = trained(model, network, rounds=12)
    choice = choose(found, costs, length)
    assert choice.way in found
    assert choice.longest.computed(length) == min(way.computed(length) for way in found)
    best = min(costs.seconds(way, length) for way in found)
    margin = max(LEAST_GAIN_S, LEAST_GAIN_SHARE * choice.longest_seconds)
    assert choice.seconds <= best + margin
    if choice.way != choice.longest:
        assert choice.longest_seconds - choice.seconds >= margin


@given(model=MODEL, network=NETWORK)
def test_what_is_learnt_predicts_what_was_measured(
    model: tuple[float, float], network: tuple[float, float]
) -> None:
    costs = trained(model, network)
    for start, tokens in ((0, 4000), (200_000, 2048), (400_000, 512)):
        really = tokens * (model[0] + model[1] * (start + tokens / 2))
        said = costs.compute.predict(tokens, tokens * (start + tokens / 2))
        assert really / 3 < said < really * 3
    for size in (1 << 12, 1 << 20, 1 << 26):
        really = network[0] + network[1] * size
        assert really / 3 < costs.fetch.predict(1, size) < really * 3


@given(
    st.lists(
        st.tuples(
            st.floats(0, 1e9),
            st.floats(0, 1e15),
            st.one_of(st.floats(0, 1e9), st.just(math.inf), st.just(math.nan)),
        ),
        max_size=60,
    )
)
def test_no_measurement_takes_a_factor_out_of_its_bounds(
    seen: list[tuple[float, float, float]],
) -> None:
    line = Line((1e-4, 1e-9), range=1e3)
    for x0, x1, seconds in seen:
        line.learn(x0, x1, seconds)
        for factor, prior in zip(line.factors, line.prior, strict=True):
            assert prior / 1001 <= factor <= prior * 1001


def test_one_outlier_changes_no_choice() -> None:
    costs = trained((1e-4, 1e-10), (0.002, 1e-9))
    found = ways(30_000, [29_952], blocks=117, layout=LAYOUT, replay_tokens=0)
    costs.fetched(1 << 20, 60.0)
    assert choose(found, costs, 30_000).way.position == 29_952


def test_a_slow_store_is_left_and_tried_again() -> None:
    """30,000 tokens take 0.3 s to compute; the store takes 20 s for anything."""
    costs = trained((1e-5, 1e-15), (20.0, 1e-9))
    found = ways(30_000, [29_952], blocks=117, layout=LAYOUT, replay_tokens=0)
    assert choose(found, costs, 30_000).way is NOTHING
    for _ in range(200):
        costs.fetch.forget()
    assert choose(found, costs, 30_000).way.position == 29_952


def test_the_slower_the_store_the_less_is_fetched() -> None:
    """A late token costs more than an early one, so between all and nothing lies a middle."""
    positions = []
    for bytes_per_s in (1e9, 1e6, 2e5, 1e5, 6e4):
        costs = Costs()
        for number in range(200):
            start, size = number * 811 % 131_072, 1 << (16 + number % 6)
            costs.computed(start, 512, 512 * (1e-5 + 1e-9 * start))
            costs.fetched(size, 0.001 + size / bytes_per_s)
        states = [8192 * k for k in range(1, 17)]
        found = ways(131_082, states, blocks=512, layout=LAYOUT, replay_tokens=0)
        positions.append(choose(found, costs, 131_082).way.position)
    assert positions == sorted(positions, reverse=True)
    assert positions[0] == 131_072
    assert positions[-1] < 131_072


def test_before_anything_is_measured_the_longest_prefix_is_taken() -> None:
    for position in (128, 8192, 1 << 20):
        found = ways(
            position, [128, position], blocks=position // 256, layout=LAYOUT, replay_tokens=128
        )
        assert choose(found, Costs(), position).way.position == position


def test_a_replay_is_taken_where_the_state_is_missing() -> None:
    found = ways(20_000, [8192], blocks=78, layout=LAYOUT, replay_tokens=5504)
    choice = choose(found, Costs(), 20_000)
    assert (choice.way.kind, choice.way.position, choice.way.start) == (
        Kind.REPLAY,
        19_968,
        19_968 - 5504,
    )
    nearer = ways(20_000, [16_384], blocks=78, layout=LAYOUT, replay_tokens=5504)
    assert choose(nearer, Costs(), 20_000).way.kind is Kind.STATE
