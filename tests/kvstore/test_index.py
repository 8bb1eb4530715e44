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
    await index.remove(IDS[:3], node_id="node-1")
    assert await index.lookup(IDS[:3]) == [None, THERE, None]


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
