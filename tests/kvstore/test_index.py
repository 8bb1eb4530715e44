"""What every `Index` must do, and what the Redis one does when Redis is gone, slow or wiped."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator

import pytest

from kvstore.contracts import Index, Location
from kvstore.index.breaker import Breaker
from kvstore.index.embedded import EmbeddedIndex
from kvstore.index.redis import RedisIndex
from penstock.errors import IndexUnavailableError, UsageError
from tests.kvstore.redis_server import RedisServer, running_redis

IDS = [bytes([number]) * 32 for number in range(10)]
HERE = Location("node-1", 7, 100)
THERE = Location("node-2", 9, 100)


@pytest.fixture(params=["embedded", "redis"])
async def index(request: pytest.FixtureRequest) -> AsyncIterator[Index]:
    made: Index
    if request.param == "embedded":
        made = EmbeddedIndex()
    else:
        redis: RedisServer = request.getfixturevalue("shared_redis")
        redis.command(b"FLUSHALL")
        made = RedisIndex(redis.url, lookup_timeout_s=1.0)
    yield made
    await made.close()


@pytest.fixture
def own_redis() -> Iterator[RedisServer]:
    with running_redis() as server:
        yield server


async def test_added_entries_are_found_and_others_are_not(index: Index) -> None:
    await index.add([(IDS[0], HERE), (IDS[2], THERE)])
    assert await index.lookup(IDS[:4]) == [HERE, None, THERE, None]
    assert await index.lookup([]) == []


async def test_a_node_removes_only_its_own_entries(index: Index) -> None:
    await index.add([(IDS[0], HERE), (IDS[1], THERE)])
    await index.remove(IDS[:3], node_id="node-1", epoch=7)
    assert await index.lookup(IDS[:3]) == [None, THERE, None]


@pytest.mark.parametrize(
    ("early", "late"), [(7, 8), (7, 2**32 + 1), (2**53, 2**53 + 1), (2**63, 2**64 - 1)]
)
async def test_an_earlier_life_of_a_node_changes_nothing_of_a_later_one(
    index: Index, early: int, late: int
) -> None:
    old, new = Location("node-1", early, 100), Location("node-1", late, 200)
    await index.add([(IDS[0], old)])
    await index.add([(IDS[0], new), (IDS[1], new)])
    await index.add([(IDS[0], old), (IDS[1], old), (IDS[2], old)])
    assert await index.lookup(IDS[:3]) == [new, new, old]
    await index.remove(IDS[:3], node_id="node-1", epoch=early)
    assert await index.lookup(IDS[:3]) == [new, new, None]
    await index.add([(IDS[2], old)])
    await index.remove(IDS[:3], node_id="node-1", epoch=late)
    assert await index.lookup(IDS[:3]) == [None, None, None]


async def test_another_node_may_replace_an_entry_whatever_its_epoch(index: Index) -> None:
    """Else an entry of a dead node would keep those of live ones out until its TTL."""
    await index.add([(IDS[0], THERE)])
    await index.add([(IDS[0], HERE)])
    await index.remove(IDS[:1], node_id="node-2", epoch=9)
    assert await index.lookup(IDS[:1]) == [HERE]


async def test_the_first_heartbeat_of_a_life_is_unknown_the_next_is_not(index: Index) -> None:
    assert not await index.heartbeat("node-1", "host:1", 7)
    assert await index.heartbeat("node-1", "host:1", 7)
    assert not await index.heartbeat("node-1", "host:1", 8)
    assert await index.nodes() == {"node-1": ("host:1", 8)}


async def test_many_entries_take_one_lookup(index: Index) -> None:
    ids = [number.to_bytes(32, "big") for number in range(10_000)]
    await index.add([(id_, HERE) for id_ in ids])
    assert await index.lookup(ids) == [HERE] * len(ids)


async def test_foreign_values_under_our_keys_are_no_entries(shared_redis: RedisServer) -> None:
    index = RedisIndex(shared_redis.url, lookup_timeout_s=1.0)
    for number, value in enumerate((b"", b"x", b"\xff" * 40)):
        await index._redis.set(b"kv:o:" + IDS[number], value)
    assert await index.lookup(IDS[:3]) == [None, None, None]
    await index.close()


async def test_foreign_values_of_any_type_give_way_to_an_entry_and_are_never_removed(
    shared_redis: RedisServer,
) -> None:
    index = RedisIndex(shared_redis.url, lookup_timeout_s=1.0)
    keys = [b"kv:o:" + id_ for id_ in IDS[:3]]
    await index._redis.delete(*keys)
    await index._redis.set(keys[0], b"\xff" * 40)
    await index._redis.rpush(keys[1], b"a list")
    await index.remove(IDS[:3], node_id="node-1", epoch=7)
    assert await index._redis.exists(*keys) == 2
    await index.add([(id_, HERE) for id_ in IDS[:3]])
    assert await index.lookup(IDS[:3]) == [HERE] * 3
    await index.close()


async def test_a_redis_that_lost_its_scripts_gets_them_again(own_redis: RedisServer) -> None:
    index = RedisIndex(own_redis.url, lookup_timeout_s=1.0)
    await index.add([(IDS[0], HERE), (IDS[1], HERE)])
    own_redis.command(b"SCRIPT FLUSH")
    await index.remove(IDS[:1], node_id="node-1", epoch=7)
    own_redis.command(b"SCRIPT FLUSH")
    await index.add([(IDS[2], THERE)])
    assert await index.lookup(IDS[:3]) == [None, HERE, THERE]
    await index.close()


async def test_a_dead_redis_costs_nothing_after_a_few_calls(own_redis: RedisServer) -> None:
    index = RedisIndex(own_redis.url)
    await index.add([(IDS[0], HERE)])
    own_redis.kill()
    for _ in range(4):
        with pytest.raises(IndexUnavailableError):
            await index.lookup(IDS)
    started = time.perf_counter()
    for _ in range(500):
        with pytest.raises(IndexUnavailableError):
            await index.lookup(IDS)
    cost_s = (time.perf_counter() - started) / 500
    print(f"a lookup while Redis is dead: {cost_s * 1e6:.0f} us")
    assert cost_s < 0.001
    own_redis.start()
    await asyncio.sleep(1.1)
    assert await index.lookup(IDS[:1]) == [None]
    await index.close()


async def test_a_redis_that_stalls_is_given_up_in_time_and_its_late_answers_are_not_mixed_up(
    own_redis: RedisServer,
) -> None:
    index = RedisIndex(own_redis.url, lookup_timeout_s=0.05)
    await index.add([(IDS[0], HERE), (IDS[1], THERE)])
    assert await index.lookup(IDS[:1]) == [HERE]
    assert own_redis.process is not None
    os.kill(own_redis.process.pid, signal.SIGSTOP)
    started = time.monotonic()
    for _ in range(2):
        with pytest.raises(IndexUnavailableError):
            await index.lookup(IDS[:1])
    assert time.monotonic() - started < 0.5
    os.kill(own_redis.process.pid, signal.SIGCONT)
    await asyncio.sleep(0.1)
    assert await index.lookup(IDS[1:2]) == [THERE]
    await index.close()


async def test_credentials_work_and_never_show(own_redis: RedisServer) -> None:
    own_redis.command(b"CONFIG SET requirepass s3cret")
    good = RedisIndex(f"redis://default:s3cret@127.0.0.1:{own_redis.port}/0", lookup_timeout_s=1.0)
    assert await good.lookup(IDS[:1]) == [None]
    await good.close()
    wrong = RedisIndex(f"redis://default:wr0ng@127.0.0.1:{own_redis.port}/0", lookup_timeout_s=1.0)
    with pytest.raises(IndexUnavailableError) as caught:
        await wrong.lookup(IDS[:1])
    assert "wr0ng" not in caught.value.message
    await wrong.close()


async def test_urls_are_checked_without_repeating_them() -> None:
    await RedisIndex("rediss://user:pw@example.invalid:6380/1").close()
    with pytest.raises(UsageError) as caught:
        RedisIndex("http://user:pw@example.invalid")
    assert "pw" not in caught.value.message.replace("password", "")


def test_a_breaker_lets_one_trial_through_per_cooldown() -> None:
    now = 0.0
    breaker = Breaker(clock=lambda: now, threshold=2, cooldown_s=1.0)
    breaker.failed()
    assert breaker.allow()
    breaker.failed()
    assert not breaker.closed
    assert not breaker.allow()
    now = 1.0
    assert [breaker.allow(), breaker.allow()] == [True, False]
    breaker.failed()
    now = 1.9
    assert not breaker.allow()
    now = 2.0
    assert breaker.allow()
    breaker.succeeded()
    assert breaker.closed
    assert breaker.allow()
