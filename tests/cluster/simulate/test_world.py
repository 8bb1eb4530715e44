"""The simulated cluster: what must hold of every run, whatever the trace and the sizes."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.policy import RoutingPolicy
from cluster.simulate.costs import PRESETS, Costs
from cluster.simulate.figures import Result
from cluster.simulate.trace import Drawn, SimRequest, Trace, draw
from cluster.simulate.world import Plan, World
from kvstore.policy.choice import Eviction

SMALL = PRESETS["fake"].model_copy(
    update={
        "chunk_tokens": 512,
        "prefill_running": 2,
        "prefill_queued": 4,
        "decode_running": 3,
        "decode_queued": 4,
        "admission_timeout_s": 3.0,
    }
)

plans = st.builds(
    Plan,
    costs=st.sampled_from([SMALL, PRESETS["flash"], SMALL.model_copy(update={"state_bytes": 0})]),
    prefill=st.integers(1, 3),
    decode=st.integers(1, 3),
    policy=st.sampled_from(list(RoutingPolicy)),
    store_bytes=st.sampled_from([None, 20_000, 400_000, 50_000_000]),
    eviction=st.sampled_from(list(Eviction)),
    max_tokens=st.sampled_from([None, 4000]),
)
traces = st.builds(
    draw,
    st.builds(
        Drawn,
        requests=st.integers(1, 60),
        rate=st.sampled_from([0.5, 5.0, 100.0]),
        prompt=st.sampled_from([1, 300, 4000]),
        answer=st.sampled_from([1, 30, 200]),
        spread=st.sampled_from([0.0, 0.8]),
        turns=st.integers(1, 4),
        pause=st.sampled_from([0.0, 1.0]),
    ),
    seed=st.integers(0, 5),
)


def ran(plan: Plan, trace: Trace) -> tuple[World, Result]:
    world = World(plan, trace)
    return world, world.run()


@settings(max_examples=50, deadline=None)
@given(plan=plans, trace=traces)
def test_every_request_ends_once_with_its_tokens_in_order_of_time(plan: Plan, trace: Trace) -> None:
    world, result = ran(plan, trace)
    assert sorted(life.request.number for life in result.lives) == list(range(len(trace.requests)))
    assert result.served + sum(result.refused.values()) == len(trace.requests)
    for life in result.lives:
        request = life.request
        assert life.end_s >= request.arrival_s
        if life.refused:
            assert life.emitted_tokens == 0 and life.first_token_s < 0
            continue
        assert life.emitted_tokens == request.output_tokens
        assert life.cached_tokens + life.computed_tokens == request.prompt_tokens
        assert request.arrival_s < life.granted_s < life.prefill_began_s
        assert life.prefill_began_s < life.first_token_s <= life.end_s
    served = [life for life in result.lives if life.served]
    assert result.computed_tokens == sum(w.computed_tokens for w in world.prefill.values())
    assert result.answer_tokens == sum(w.tokens for w in world.decode.values())
    assert result.answer_tokens == sum(life.request.output_tokens for life in served)


@settings(max_examples=25, deadline=None)
@given(plan=plans, trace=traces)
def test_afterwards_nothing_is_held(plan: Plan, trace: Trace) -> None:
    world, _ = ran(plan, trace)
    usage = world.store.catalog.usage()
    assert (usage.leases, usage.reservations, usage.reserved_bytes) == (0, 0, 0)
    assert plan.store_bytes is None or usage.used_bytes <= world.store.catalog.limits.capacity_bytes
    assert world.router.held == 0
    for prefill in world.prefill.values():
        assert (
            prefill.idle and prefill.scheduler.used_bytes == prefill.scheduler.pending_tokens == 0
        )
    for decode in world.decode.values():
        assert decode.idle and decode.credits.reserved_bytes == 0


@settings(max_examples=10, deadline=None)
@given(plan=plans, trace=traces)
def test_the_same_plan_and_trace_give_the_same_result(plan: Plan, trace: Trace) -> None:
    once, again = (ran(plan, trace)[1].to_json() for _ in range(2))
    assert json.dumps(once, allow_nan=False) == json.dumps(again, allow_nan=False)


@settings(max_examples=12, deadline=None)
@given(
    policy=st.sampled_from([RoutingPolicy.COST, RoutingPolicy.LEAST_LOAD]),
    seed=st.integers(0, 1000),
    workers=st.integers(1, 3),
)
def test_twice_the_workers_are_no_worse_in_the_mean(
    policy: RoutingPolicy, seed: int, workers: int
) -> None:
    trace = draw(Drawn(requests=50, rate=8, prompt=2000, answer=40), seed=seed)
    costs = PRESETS["fake"]
    few, many = (
        ran(Plan(costs, prefill=n, decode=n, policy=policy), trace)[1]
        for n in (workers, 2 * workers)
    )
    assert few.served == many.served == 50
    assert many.ttft_mean_s <= few.ttft_mean_s * 1.02


def at(*arrivals: float, prompt: int, output: int) -> Trace:
    return Trace(
        "by hand",
        tuple(SimRequest(i, s, prompt, output, ()) for i, s in enumerate(arrivals)),
    )


PLAIN = Costs(
    prefill_tokens_per_s=1000,
    decode_step_s=0.1,
    decode_stream_s=0.01,
    decode_context_s=0.0001,
    fetch_bytes_per_s=1e6,
    bytes_per_token=1,
    state_bytes=0,
    front_s=0.01,
    reserve_s=0.01,
    restore_s=0.01,
    handover_s=0.01,
    deliver_s=0,
    chunk_tokens=1024,
)


def test_one_request_costs_what_the_coefficients_say() -> None:
    _, result = ran(Plan(PLAIN), at(0.0, prompt=2000, output=11))
    (life,) = result.lives
    # Chunks of 1,024 and 976: the second one's transfer is exposed twice, out and in.
    overheads = 0.01 * 4 + 2 * 976e-6
    assert life.ttft_s == pytest.approx(2.0 + overheads - 0, abs=1e-3)
    # Ten steps after the first token, over contexts of 2,000 to 2,009 tokens.
    steps = sum(0.1 + 0.01 + 0.0001 * (2000 + i) for i in range(10))
    assert life.e2e_s - life.ttft_s == pytest.approx(steps)
    assert result.gap_s["p50"] == pytest.approx(steps / 10)


def test_opening_and_joining_wait_for_the_end_of_the_step_under_way() -> None:
    """The slow way: one step after the other, as the batch's thread does it."""
    arrivals = (0.0, 0.33, 0.71, 1.4)
    costs = PLAIN.model_copy(update={"prefill_tokens_per_s": 1e6})
    _, result = ran(Plan(costs), at(*arrivals, prompt=300, output=25))
    asked = {i: s + 0.01 for i, s in enumerate(arrivals)}
    # From credit to attached: fixed parts, 0.3 ms of computing, 300 bytes out and in.
    way_s = 0.03 + 300e-6 + 2 * 300e-6
    attached: dict[int, float] = {}
    first: dict[int, float] = {}
    ended: dict[int, float] = {}
    streams: dict[int, int] = {}
    now = 0.0
    while len(ended) < len(arrivals):
        if not streams and not any(s <= now for s in attached.values()):
            # Idle: who asks is granted at once, until somebody has been attached.
            while asked and min(asked.values()) <= min(attached.values(), default=9.0):
                i = min(asked, key=lambda i: asked[i])
                attached[i] = asked.pop(i) + way_s
            now = min(attached.values())
        fresh = [i for i, s in attached.items() if s <= now]
        for i in fresh:
            del attached[i]
        if streams:
            context = sum(300 + done - 1 for done in streams.values())
            now += 0.1 + 0.01 * len(streams) + 0.0001 * context
        for i in list(streams):
            streams[i] += 1
            if streams[i] == 25:
                ended[i] = now
                del streams[i]
        for i in fresh:
            streams[i], first[i] = 1, now
        for i in [i for i, s in asked.items() if s <= now]:
            del asked[i]
            attached[i] = now + way_s
    for life in result.lives:
        number = life.request.number
        assert life.first_token_s == pytest.approx(first[number], abs=1e-6)
        assert life.end_s == pytest.approx(ended[number], abs=1e-6)


def test_a_second_turn_computes_only_what_is_new() -> None:
    blocks = tuple(bytes([i]) * 32 for i in range(8))
    first = SimRequest(0, 0.0, 768, 5, blocks[:3])
    second = SimRequest(1, 60.0, 2048, 5, blocks)
    trace = Trace("two turns", (first, second))
    for costs in (PRESETS["flash"], PRESETS["flash"].model_copy(update={"state_bytes": 0})):
        _, result = ran(Plan(costs), trace)
        assert [life.cached_tokens for life in result.lives] == [0, 768]
        assert result.hit_rate == pytest.approx(768 / (768 + 2048))


def test_a_branch_keeps_a_state_for_the_next_one() -> None:
    """A long prompt, then others that share its first half: the second of those resumes there."""
    shared = tuple(bytes([1, i]) * 16 for i in range(11))
    requests = tuple(
        SimRequest(
            i, 100.0 * i, 20 * 256, 2, shared + tuple(bytes([9 + i, j]) * 16 for j in range(9))
        )
        for i in range(3)
    )
    _, result = ran(Plan(PRESETS["flash"]), Trace("branches", requests))
    # No state stands there at first: the second prompt computes from the start and leaves one.
    assert [life.cached_tokens for life in result.lives] == [0, 0, 11 * 256]


def test_a_request_that_can_never_fit_and_one_too_many_are_refused() -> None:
    costs = PLAIN.model_copy(update={"decode_memory_bytes": 3000, "decode_queued": 1})
    _, result = ran(Plan(costs), at(0.0, prompt=4000, output=1))
    assert result.refused == {"context length": 1}
    _, result = ran(Plan(costs), at(0.0, 0.0, 0.0, 0.0, prompt=1999, output=20))
    assert result.refused == {"decode: queue_full": 2} and result.served == 2
