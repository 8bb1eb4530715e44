"""Eviction policies: the contract for each, and what the store's own one promises on top."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.policy.choice import Eviction, open_policy
from kvstore.policy.contracts import EvictionPolicy, Resident
from kvstore.policy.replay import TraceRequest, read_trace, replay, unique_bytes
from kvstore.policy.reuse import STATE_SHARE, ReuseTree
from penstock.blocks import ObjectKind
from penstock.errors import InvalidRequestError, UsageError

SIZE = 10
POLICIES = list(Eviction)
MOONCAKE = Path(__file__).parents[3] / "shared/data/mooncake/conversation_trace.jsonl"


def name(number: int) -> bytes:
    return number.to_bytes(32, "big")


def block(number: int, parent: int = 0, *, size: int = SIZE, position: int = 256) -> Resident:
    return Resident(name(number), name(parent), ObjectKind.BLOCK, size, position)


def state(number: int, parent: int, *, size: int = SIZE) -> Resident:
    return Resident(name(number), name(parent), ObjectKind.STATE, size, 256)


def chain(policy: EvictionPolicy, first: int, length: int) -> list[bytes]:
    """A prompt's blocks, written and let go from its end, as a released request does it."""
    for number in range(first, first + length):
        parent = number - 1 if number > first else 0
        policy.insert(block(number, parent, position=(number - first + 1) * 256))
    ids = [name(number) for number in range(first, first + length)]
    for id_ in reversed(ids):
        policy.free(id_)
    return ids


def evict(policy: EvictionPolicy, size: int) -> list[bytes]:
    victims = policy.victims(need_bytes=size, need_objects=0)
    assert victims is not None
    for id_ in victims:
        policy.remove(id_)
    return victims


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["insert", "used", "hold", "free", "remove", "ask", "evict"]),
        st.integers(1, 8),
        st.integers(0, 8),
        st.integers(1, 40),
        st.booleans(),
    ),
    max_size=60,
)


@pytest.mark.parametrize("eviction", POLICIES)
@settings(max_examples=150, deadline=None)
@given(steps=STEPS)
def test_victims_are_idle_enough_and_never_more_than_needed(
    eviction: Eviction, steps: list[tuple[str, int, int, int, bool]]
) -> None:
    policy = open_policy(eviction, 100)
    sizes: dict[bytes, int] = {}
    idle: set[bytes] = set()
    for step, number, parent, size, is_state in steps:
        id_ = name(number)
        if step == "insert" and id_ not in sizes:
            kind = ObjectKind.STATE if is_state else ObjectKind.BLOCK
            policy.insert(Resident(id_, name(parent), kind, size, parent * 256))
            sizes[id_] = size
        elif step in ("ask", "evict"):
            victims = policy.victims(need_bytes=size, need_objects=parent % 3)
            if victims is None:
                assert sum(sizes[i] for i in idle) < size or len(idle) < parent % 3
                continue
            assert set(victims) <= idle and len(set(victims)) == len(victims)
            assert sum(sizes[i] for i in victims) >= size and len(victims) >= parent % 3
            spared = sum(sizes[i] for i in victims[:-1])
            assert spared < size or len(victims) - 1 < parent % 3, "one victim less would do"
            if step == "evict":
                for victim in victims:
                    policy.remove(victim)
                    del sizes[victim]
                    idle.discard(victim)
        elif id_ in sizes:
            move = {
                "insert": policy.used,
                "used": policy.used,
                "hold": policy.hold,
                "free": policy.free,
                "remove": policy.remove,
            }[step]
            move(id_)
            if step == "free":
                idle.add(id_)
            elif step in ("hold", "remove"):
                idle.discard(id_)
            if step == "remove":
                del sizes[id_]
        assert policy.idle_bytes == sum(sizes[i] for i in idle)
        assert policy.idle_objects == len(idle)


@settings(max_examples=150, deadline=None)
@given(
    parents=st.lists(st.integers(0, 30), min_size=1, max_size=30),
    held=st.sets(st.integers(1, 30)),
    used=st.sets(st.integers(1, 30)),
    need=st.integers(1, 30),
)
def test_no_object_leaves_before_the_idle_ones_that_continue_it(
    parents: list[int], held: set[int], used: set[int], need: int
) -> None:
    policy = ReuseTree(1000)
    parent_of = {number: above % number for number, above in enumerate(parents, 1)}
    for number, above in parent_of.items():
        policy.insert(block(number, above))
    idle = [number for number in parent_of if number not in held]
    for number in idle:
        policy.free(name(number))
        if number in used:
            policy.used(name(number))
    victims = policy.victims(need_bytes=min(need, len(idle)) * SIZE, need_objects=0)
    assert victims is not None
    gone: set[int] = set()
    for id_ in victims:
        number = int.from_bytes(id_, "big")
        left = {child for child, above in parent_of.items() if above == number} - gone
        leaves = [
            other
            for other in set(idle) - gone
            if not {child for child, above in parent_of.items() if above == other} - gone
        ]
        assert not left or not leaves, "an inner object left while there was an idle leaf"
        gone.add(number)


def test_what_was_used_again_outlives_what_came_later() -> None:
    policy = ReuseTree(100)
    asked_twice = chain(policy, 10, 2)
    for id_ in asked_twice:
        policy.used(id_)
        policy.free(id_)
    later = chain(policy, 20, 2)
    assert evict(policy, 2 * SIZE) == later[::-1]


def test_a_use_is_forgotten_after_a_few_capacities_of_writes() -> None:
    policy = ReuseTree(100)
    once = chain(policy, 10, 1)
    policy.used(once[0])
    policy.free(once[0])
    for round_ in range(20):
        chain(policy, 100 + round_, 1)
        if evict(policy, SIZE) == once:
            assert round_ >= 4, "a use is worth half a capacity: five of these"
            return
    raise AssertionError("an object that nobody wants any more stays for ever")


@pytest.mark.parametrize(("eviction", "survives"), [(Eviction.REUSE, True), (Eviction.LRU, False)])
def test_a_one_off_document_does_not_flush_what_others_use(
    eviction: Eviction, survives: bool
) -> None:
    """Three documents of half the store each, every one read once, beside ten blocks in use."""
    capacity = 100
    policy = open_policy(eviction, capacity * SIZE)
    hot = [name(number) for number in range(1, 11)]
    for number in range(1, 11):
        policy.insert(block(number))
        policy.free(name(number))
        policy.used(name(number))
        policy.free(name(number))
    resident = len(hot)
    gone: set[bytes] = set()
    for document in range(3):
        first = 1000 * (document + 1)
        for number in range(first, first + 50):
            if resident == capacity:
                gone.update(evict(policy, SIZE))
                resident -= 1
            parent = number - 1 if number > first else 0
            policy.insert(block(number, parent, position=(number - first + 1) * 256))
            resident += 1
        for number in range(first + 49, first - 1, -1):
            policy.free(name(number))
    assert (not gone & set(hot)) is survives


def test_states_beyond_their_share_leave_before_any_block() -> None:
    policy = ReuseTree(100)
    allowed = int(100 * STATE_SHARE / SIZE)
    for number in range(1, allowed + 3):
        policy.insert(state(number, 0))
        policy.free(name(number))
        policy.used(name(number))
        policy.free(name(number))
    policy.insert(block(50))
    policy.free(name(50))
    assert evict(policy, 2 * SIZE) == [name(1), name(2)], "over their share, whatever their use"
    assert evict(policy, SIZE) == [name(50)], "within it they compare as blocks do"


def test_what_comes_back_soon_counts_as_used() -> None:
    policy = ReuseTree(100)
    first = chain(policy, 10, 1)
    assert evict(policy, SIZE) == first
    chain(policy, 10, 1)
    other = chain(policy, 20, 1)
    assert evict(policy, SIZE) == other


def test_the_heaps_stay_bounded() -> None:
    policy = ReuseTree(100)
    ids = chain(policy, 10, 5)
    for _ in range(10_000):
        for id_ in ids:
            policy.hold(id_)
            policy.free(id_)
    assert len(policy._leaves) + len(policy._inner) < 3000


def small_trace() -> list[TraceRequest]:
    prompts = [[1, 2, 3], [1, 2, 3, 4], [9], [1, 2, 3, 4, 5]]
    return [TraceRequest(512 * len(ids) + 100, tuple(map(name, ids))) for ids in prompts]


def test_a_replay_counts_tokens_bytes_and_evictions() -> None:
    result = replay(
        small_trace(),
        policy=open_policy(Eviction.LRU, 10_000),
        capacity_bytes=10_000,
        bytes_per_token=1.0,
    )
    assert (result.requests, result.prompt_tokens) == (4, 512 * 13 + 400)
    assert result.hit_tokens == 512 * (3 + 4)
    assert result.written_bytes == 512 * 6 == result.unique_bytes
    assert (result.evictions, result.refused) == (0, 0)


def test_a_prompt_larger_than_the_store_is_cut_not_lost() -> None:
    result = replay(
        small_trace(),
        policy=open_policy(Eviction.REUSE, 1024),
        capacity_bytes=1024,
        bytes_per_token=1.0,
    )
    assert result.refused > 0
    assert result.hit_tokens >= 512


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "line 1"),
        ('{"input_length": 5}', "hash_ids"),
        ('{"input_length": 600, "hash_ids": [-1]}', "line 1"),
        ('{"input_length": 600, "hash_ids": "x"}', "line 1"),
        ("[1]", "line 1"),
    ],
)
def test_a_trace_that_is_none_is_named_with_its_line(
    tmp_path: Path, line: str, problem: str
) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(UsageError, match=problem):
        read_trace(path)
    with pytest.raises(UsageError, match="cannot be read"):
        read_trace(tmp_path / "none.jsonl")


def test_bytes_per_token_must_be_positive() -> None:
    with pytest.raises(InvalidRequestError):
        unique_bytes(small_trace(), bytes_per_token=0)


@pytest.mark.skipif(not MOONCAKE.exists(), reason="the Mooncake trace is not beside the checkout")
def test_on_a_production_trace_reuse_beats_lru_and_s3_fifo() -> None:
    """The first 2,000 requests; the whole trace stands in docs/store.md."""
    with MOONCAKE.open() as lines:
        rows = [json.loads(next(lines)) for _ in range(2000)]
    trace = [
        TraceRequest(
            row["input_length"],
            tuple(name(id_) for id_ in row["hash_ids"][: row["input_length"] // 512]),
        )
        for row in rows
    ]
    capacity = unique_bytes(trace, bytes_per_token=1.0) // 4
    rates = {
        eviction: replay(
            trace,
            policy=open_policy(eviction, capacity),
            capacity_bytes=capacity,
            bytes_per_token=1.0,
        ).hit_rate
        for eviction in POLICIES
    }
    assert rates[Eviction.REUSE] > rates[Eviction.LRU] > 0
    assert rates[Eviction.REUSE] > rates[Eviction.S3_FIFO] > 0
