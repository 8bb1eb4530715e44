"""The worker directory: soft state that follows the heartbeats."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from kvstore.config import StoreConfig
from kvstore.directory import WorkerDirectory
from kvstore.directory_client import DirectoryClient
from kvstore.server import StoreServer, start_server
from penstock.errors import InvalidRequestError, OverloadedError, StoreUnavailableError
from protos.penstock.kv.v1 import kv_pb2


def worker(name: str, running: int = 0) -> kv_pb2.Worker:
    return kv_pb2.Worker(
        worker_id=name,
        role=kv_pb2.WORKER_ROLE_DECODE,
        address="host:1",
        running=running,
        metrics={"tokens_total": 3.0},
    )


@pytest.fixture
async def server() -> AsyncIterator[StoreServer]:
    running = await start_server(StoreConfig(memory_bytes=1000))
    yield running
    await running.stop(0.1)


async def test_workers_are_listed_as_they_last_described_themselves(server: StoreServer) -> None:
    client = DirectoryClient(server.address)
    assert await client.register(worker("b"), ttl_s=5) == server.node.epoch
    await client.register(worker("a"), ttl_s=5)
    await client.register(worker("b", running=2), ttl_s=5)
    assert await client.list() == [worker("a"), worker("b", running=2)]
    await client.deregister("a")
    await client.deregister("a")
    assert await client.list() == [worker("b", running=2)]
    await client.close()


async def test_a_worker_without_heartbeat_disappears(server: StoreServer) -> None:
    client = DirectoryClient(server.address)
    await client.register(worker("a"), ttl_s=0.2)
    await asyncio.sleep(0.3)
    assert await client.list() == []
    await client.close()


async def test_registered_keeps_a_worker_listed_and_takes_it_away_at_the_end(
    server: StoreServer,
) -> None:
    client = DirectoryClient(server.address)
    beats = iter(range(1000))
    async with client.registered(
        lambda: worker("a", running=next(beats)), ttl_s=0.3, period_s=0.05
    ):
        await asyncio.sleep(0.5)
        (listed,) = await client.list()
        assert listed.running > 3
    assert await client.list() == []
    await client.close()


async def test_a_worker_comes_back_by_itself_after_a_restart_of_the_node() -> None:
    first = await start_server(StoreConfig(memory_bytes=1000))
    client = DirectoryClient(first.address)
    async with client.registered(lambda: worker("a"), ttl_s=5, period_s=0.1):
        await first.stop(0)
        with pytest.raises(StoreUnavailableError):
            await client.list()
        second = await start_server(StoreConfig(memory_bytes=1000, listen=first.address))
        async with asyncio.timeout(5):
            while True:
                try:
                    if await client.list():
                        break
                except StoreUnavailableError:
                    pass
                await asyncio.sleep(0.05)
    await client.close()
    await second.stop(0)


def test_entries_that_nobody_could_call_are_refused_in_a_sentence() -> None:
    directory = WorkerDirectory(clock=lambda: 0.0, max_workers=1)
    for wrong in (
        kv_pb2.Worker(),
        kv_pb2.Worker(worker_id="a", address="h:1"),
        kv_pb2.Worker(worker_id="a" * 300, address="h:1", role=kv_pb2.WORKER_ROLE_DECODE),
    ):
        with pytest.raises(InvalidRequestError):
            directory.register(wrong, 1.0)
    with pytest.raises(InvalidRequestError, match="TTL"):
        directory.register(worker("a"), 0.0)
    directory.register(worker("a"), 1.0)
    directory.register(worker("a"), 1.0)
    with pytest.raises(OverloadedError):
        directory.register(worker("b"), 1.0)


def test_a_ttl_beyond_the_cap_is_shortened() -> None:
    now = 0.0
    directory = WorkerDirectory(clock=lambda: now, max_ttl_s=10.0)
    directory.register(worker("a"), 1e6)
    now = 9.0
    assert directory.live() == [worker("a")]
    now = 10.0
    assert directory.live() == []
