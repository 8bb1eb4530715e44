"""The store in its three forms, each behind the same `World`: fake, embedded index, Redis index."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

import pytest

from kvstore.client import StoreClient
from kvstore.config import StoreConfig
from kvstore.contracts import BlockStore
from kvstore.fake import MemoryBlockStore
from kvstore.node import StoreNode
from kvstore.server import StoreServer, start_server
from penstock.blocks import CacheLayout
from tests.kvstore.objects import FINGERPRINT, LAYOUT
from tests.kvstore.redis_server import RedisServer, running_redis

CAPACITY_BYTES = 64 * 1024


@dataclass
class World:
    """One node and as many clients of it as a test asks for."""

    node: StoreNode
    connect: Callable[[bytes, CacheLayout], BlockStore]
    server: StoreServer | None = None
    clients: list[BlockStore] = field(default_factory=list)

    def client(self, fingerprint: bytes = FINGERPRINT, layout: CacheLayout = LAYOUT) -> BlockStore:
        made = self.connect(fingerprint, layout)
        self.clients.append(made)
        return made


@pytest.fixture(scope="session")
def shared_redis() -> Iterator[RedisServer]:
    with running_redis() as server:
        yield server


@pytest.fixture(params=["fake", "embedded", "redis"])
async def world(request: pytest.FixtureRequest) -> AsyncIterator[World]:
    async with AsyncExitStack() as stack:
        if request.param == "fake":
            node = StoreNode(StoreConfig(memory_bytes=CAPACITY_BYTES))
            made = World(
                node,
                lambda fingerprint, layout: MemoryBlockStore(
                    fingerprint=fingerprint, layout=layout, node=node
                ),
            )
        else:
            url = None
            if request.param == "redis":
                redis: RedisServer = request.getfixturevalue("shared_redis")
                redis.command(b"FLUSHALL")
                url = redis.url
            server = await start_server(
                StoreConfig(memory_bytes=CAPACITY_BYTES, redis_url=url, heartbeat_s=0.1)
            )
            stack.push_async_callback(server.stop, 0.1)
            made = World(
                server.node,
                lambda fingerprint, layout: StoreClient(
                    server.address, fingerprint=fingerprint, layout=layout, index=url
                ),
                server,
            )
        yield made
        for client in made.clients:
            await client.close()


@pytest.fixture
def store(world: World) -> BlockStore:
    return world.client()
