"""Routing is a pure function: a live pair of one fingerprint, whatever the pool looks like."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.contracts import WorkerView
from cluster.policy import (
    DECODE,
    NOTHING,
    PREFILL,
    Coefficients,
    Load,
    Policy,
    Resident,
    RoutingPolicy,
    Shape,
    pairs,
)
from cluster.routing.board import Board
from cluster.routing.charge import Charged
from cluster.routing.choice import open_policy
from cluster.routing.cost import CostPolicy
from penstock.errors import WorkerUnavailableError
from tests.cluster.routing.pools import (
    POLICIES,
    coefficients,
    equal_pool,
    every_policy,
    pools,
    worker,
)

shapes = st.builds(Shape, st.integers(1, 100_000), st.integers(0, 4000))


def board_of(pool: list[WorkerView], known: dict[str, Coefficients] | None = None) -> Board:
    board = Board()
    board.show(pool, coefficients=known)
    return board


@st.composite
def residents(draw: st.DrawFn, tokens: int = 100_000) -> Resident:
    resume = draw(st.integers(0, tokens))
    near = st.dictionaries(
        st.sampled_from([f"{PREFILL}-{i}" for i in range(6)]), st.integers(1, tokens)
    )
    size_bytes = draw(st.integers(0, 10**9))
    return Resident(resume, size_bytes, resume, draw(near), draw(near))


@settings(max_examples=300)
@given(pools, shapes, residents(), every_policy, st.integers(0, 50), st.data())
def test_a_route_is_a_live_pair_of_one_fingerprint_or_a_named_error(
    pool: list[WorkerView],
    shape: Shape,
    resident: Resident,
    policy: Policy,
    turn: int,
    data: st.DataObject,
) -> None:
    known = {w.worker_id: data.draw(coefficients) for w in pool}
    avoid = frozenset(w.worker_id for w in pool if data.draw(st.integers(0, 4)) == 0)
    live = [w for w in pool if not w.draining and w.worker_id not in avoid]
    allowed = {
        (p.worker_id, d.worker_id)
        for p in live
        for d in live
        if (p.role, d.role) == (PREFILL, DECODE) and p.fingerprint == d.fingerprint
    }
    board, mirrored = board_of(pool, known), board_of(pool[::-1], known)
    board.turn = mirrored.turn = turn
    if not allowed:
        with pytest.raises(WorkerUnavailableError):
            policy.choose(board, shape, resident, avoid=avoid)
        return
    decision = policy.choose(board, shape, resident, avoid=avoid)
    route = decision.route
    assert (route.prefill.worker_id, route.decode.worker_id) in allowed
    other = policy.choose(mirrored, shape, resident, avoid=avoid)
    assert route == other.route, "the order of the directory does not matter"
    assert list(decision.table()) == list(other.table())


@settings(max_examples=200)
@given(pools, shapes, residents(), every_policy, st.data())
def test_the_table_names_every_worker_once_and_the_chosen_one_is_its_least(
    pool: list[WorkerView], shape: Shape, resident: Resident, policy: Policy, data: st.DataObject
) -> None:
    board = board_of(pool, {w.worker_id: data.draw(coefficients) for w in pool})
    try:
        decision = policy.choose(board, shape, resident)
    except WorkerUnavailableError:
        return
    before = list(decision.table())
    assert sorted(row.worker_id for row in before) == sorted(w.worker_id for w in pool)
    for row in before:
        assert row.total == sum(row.parts.values())
        if any(w.draining for w in pool if w.worker_id == row.worker_id):
            assert row.barred == "draining"
    for chosen in (decision.route.prefill, decision.route.decode):
        rows = [row for row in before if row.role == chosen.role and not row.barred]
        least = min(rows, key=lambda row: (row.total, row.worker_id))
        assert least.worker_id == chosen.worker_id
    # Later charges do not change what is told about this decision.
    Charged(board, decision.route, shape, resident)
    assert list(decision.table()) == before


@settings(max_examples=200)
@given(
    st.integers(1, 6), st.integers(1, 6), shapes, residents(), st.data(),
    st.integers(1, 50_000), st.integers(1, 9),
)  # fmt: skip
def test_more_load_on_others_never_moves_a_request_and_on_the_chosen_never_attracts_one(
    prefills: int,
    decodes: int,
    shape: Shape,
    resident: Resident,
    data: st.DataObject,
    tokens: int,
    count: int,
) -> None:
    pool = equal_pool(prefills, decodes)
    known = {w.worker_id: data.draw(coefficients) for w in pool}
    board = board_of(pool, known)
    load = Load(tokens=tokens, pairs=pairs(0, tokens), prompts=count, sequences=count)
    for w in pool:
        if data.draw(st.booleans()):
            board.charge(w.worker_id, load)
    before = CostPolicy().choose(board, shape, resident)
    loaded = data.draw(st.sampled_from(pool)).worker_id
    costs = {row.worker_id: row.total for row in before.table()}
    board.charge(loaded, load)
    after = CostPolicy().choose(board, shape, resident)
    chosen = (before.route.prefill.worker_id, before.route.decode.worker_id)
    if loaded not in chosen:
        assert after.route == before.route
    if loaded.startswith("p"):
        # A decode row depends on the prefill time that hides it; a prefill row on its worker alone.
        assert {r.worker_id: r.total for r in after.table()}[loaded] >= costs[loaded]


@given(
    st.integers(1, 5), st.integers(1, 5), st.lists(shapes, min_size=1, max_size=40), every_policy
)
def test_charges_are_conserved_and_all_gone_at_the_end(
    prefills: int, decodes: int, requests: list[Shape], policy: Policy
) -> None:
    board = board_of(equal_pool(prefills, decodes))
    open_charges = []
    for number, shape in enumerate(requests):
        decision = policy.choose(board, shape, NOTHING)
        board.turn += 1
        open_charges.append((Charged(board, decision.route, shape, NOTHING), shape))
        if number % 3 == 0:
            early, early_shape = open_charges[number // 2]
            early.read(early_shape.prompt_tokens // 2)
            early.answering()
            early.read(1)  # What comes too late changes nothing.
    total = sum(board.charged.values(), Load())
    assert total.sequences == len(requests)
    assert total.size_bytes == sum(shape.total_tokens for shape in requests)
    assert 0 <= total.tokens <= sum(shape.prompt_tokens for shape in requests)
    for charged, _ in open_charges:
        charged.close()
        charged.close()
    assert board.charged == {}


@pytest.mark.parametrize("name", list(RoutingPolicy))
@given(count=st.integers(1, 8), requests=st.integers(1, 60), tokens=st.integers(1, 30_000))
@settings(max_examples=25)
def test_a_burst_is_spread_evenly_before_any_heartbeat_tells(
    name: RoutingPolicy, count: int, requests: int, tokens: int
) -> None:
    """Equal workers, equal requests: nobody starves, nobody gets two more than another."""
    board = board_of(equal_pool(count, count))
    taken = {w.worker_id: 0 for w in equal_pool(count, count)}
    for _ in range(requests):
        decision = POLICIES[name].choose(board, Shape(tokens, 10), NOTHING)
        board.turn += 1
        Charged(board, decision.route, Shape(tokens, 10), NOTHING)
        taken[decision.route.prefill.worker_id] += 1
        taken[decision.route.decode.worker_id] += 1
    for role in "pd":
        counts = [n for worker_id, n in taken.items() if worker_id[0] == role]
        assert max(counts) - min(counts) <= 1


@given(st.integers(2, 6), st.integers(2, 6), shapes, residents(), st.data())
def test_the_pair_is_the_best_of_all_pairs(
    prefills: int, decodes: int, shape: Shape, resident: Resident, data: st.DataObject
) -> None:
    """An oracle that tries all P x D: each pair alone on a board, its two rows added up."""
    pool = equal_pool(prefills, decodes)
    known = {w.worker_id: data.draw(coefficients) for w in pool}
    load = Load(tokens=5_000, pairs=1e7, prompts=2, sequences=3)

    def total(members: list[WorkerView]) -> tuple[float, tuple[str, str]]:
        board = board_of(members, known)
        for w in members:
            if int(w.worker_id[1:]) % 2:
                board.charge(w.worker_id, load)
        decision = CostPolicy().choose(board, shape, resident)
        route = decision.route
        pair = (route.prefill.worker_id, route.decode.worker_id)
        return sum(row.total for row in decision.table() if row.worker_id in pair), pair

    every = [total([p, d]) for p in pool[:prefills] for d in pool[prefills:]]
    assert total(pool)[0] == pytest.approx(min(every)[0])


def test_a_prompt_goes_where_it_is_read_soonest_not_where_fewest_tokens_wait() -> None:
    """p1 is ten times faster and has twice the tokens in front."""
    pool = [
        worker("p0", PREFILL, queued_tokens=10_000, running=1),
        worker("p1", PREFILL, queued_tokens=20_000, running=1),
        worker("d0", DECODE),
    ]
    known = {"p0": Coefficients(token_s=1e-3), "p1": Coefficients(token_s=1e-4)}
    board = board_of(pool, known)
    assert CostPolicy().choose(board, Shape(30_000), NOTHING).route.prefill.worker_id == "p1"
    least = open_policy(RoutingPolicy.LEAST_LOAD).choose(board, Shape(30_000), NOTHING)
    assert least.route.prefill.worker_id == "p0"


def test_blocks_without_a_state_earn_nothing_and_a_duplicate_waits_where_its_prefix_is_read() -> (
    None
):
    pool = [worker("p0", PREFILL), worker("p1", PREFILL), worker("d0", DECODE)]
    board = board_of(pool)
    blocks_only = Resident(resumable_tokens=0, overlap_tokens=90_000, seen={"p1": 90_000})
    assert CostPolicy().choose(board, Shape(90_000), blocks_only).route.prefill.worker_id == "p0"
    overlap = open_policy(RoutingPolicy.BLOCK_OVERLAP)
    assert overlap.choose(board, Shape(90_000), blocks_only).route.prefill.worker_id == "p1"
    board.charge("p1", Load(tokens=5_000, pairs=pairs(85_000, 90_000), prompts=1))
    near = Resident(near={"p1": 89_000})
    assert CostPolicy().choose(board, Shape(90_000), near).route.prefill.worker_id == "p1"


def test_slow_fetching_can_be_worse_than_a_wait() -> None:
    pool = [worker("p0", PREFILL), worker("p1", PREFILL), worker("d0", DECODE)]
    known = {"p0": Coefficients(fetch_bytes_per_s=1e6), "p1": Coefficients(fetch_bytes_per_s=1e9)}
    board = board_of(pool, known)
    board.charge("p1", Load(tokens=3_000, prompts=1))
    resident = Resident(resumable_tokens=99_900, fetch_bytes=100_000_000)
    decision = CostPolicy().choose(board, Shape(100_000), resident)
    assert decision.route.prefill.worker_id == "p1"
    slow = next(row for row in decision.table() if row.worker_id == "p0")
    assert slow.parts["work"] == slow.facts["fetch"] == pytest.approx(100.0)


def test_a_decode_worker_with_room_comes_before_an_idle_one_without() -> None:
    pool = [
        worker("p", PREFILL),
        worker("full", DECODE, capacity_bytes=1000, used_bytes=990),
        worker("busy", DECODE, capacity_bytes=1000, running=5, used_bytes=100),
    ]
    for name in (RoutingPolicy.COST, RoutingPolicy.LEAST_LOAD):
        decision = POLICIES[name].choose(board_of(pool), Shape(40, 10), NOTHING)
        assert decision.route.decode.worker_id == "busy"


def test_no_worker_could_ever_hold_it_and_one_is_chosen_to_say_so() -> None:
    pool = [worker("p", PREFILL), worker("d0", DECODE, capacity_bytes=10)]
    decision = CostPolicy().choose(board_of(pool), Shape(100), NOTHING)
    assert decision.route.decode.worker_id == "d0"


@pytest.mark.parametrize(
    ("pool", "avoid", "told"),
    [
        ([worker("d", DECODE)], frozenset(), "no prefill worker"),
        ([worker("p", PREFILL)], frozenset(), "no decode worker"),
        (
            [worker("p", PREFILL), worker("d", DECODE, fingerprint=b"x" * 32)],
            frozenset(),
            "fingerprints differ",
        ),
        ([worker("p", PREFILL), worker("d", DECODE)], frozenset({"d"}), "just failed"),
        (
            [worker("p", PREFILL, draining=True), worker("d", DECODE)],
            frozenset(),
            "no prefill worker",
        ),
    ],
)
def test_what_is_missing_is_named(pool: list[WorkerView], avoid: frozenset[str], told: str) -> None:
    for policy in POLICIES.values():
        with pytest.raises(WorkerUnavailableError, match=told):
            policy.choose(board_of(pool), Shape(10), NOTHING, avoid=avoid)


def test_loads_and_costs_that_cannot_be_are_refused() -> None:
    for wrong in ({"token_s": -1.0}, {"fetch_bytes_per_s": 0.0}, {"stay_s": -0.1}):
        with pytest.raises(ValueError, match="worker"):
            replace(Coefficients(), **wrong)
    with pytest.raises(ValueError, match="is none"):
        Shape(0)
