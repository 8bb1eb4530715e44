"""Schedules over the real wire: writers, readers and the node cut at every step of the protocol.

The server, its gRPC streams, its disk tier and Redis are real; a node that is killed stops in this
process, its files at a system call (`Medium`). Real kills of real processes: `test_processes.py`.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore import node as node_module
from kvstore.client import StoreClient
from kvstore.codec import digest_now, encode_prefix
from kvstore.config import StoreConfig
from kvstore.contracts import Missing, StoreObject
from kvstore.disk import open as open_module
from kvstore.index.redis import RedisIndex
from kvstore.server import StoreServer, start_server
from kvstore.wire import encode_data
from penstock.errors import OverloadedError
from protos.penstock.kv.v1 import kv_pb2
from tests.chaos.conftest import bounded
from tests.chaos.medium import Medium, Switch, path_on, switch
from tests.kvstore.objects import FINGERPRINT, LAYOUT, blocks_of, chain, fetch, same, state
from tests.kvstore.redis_server import RedisServer, running_redis

__all__ = ["switch"]

PROMPT = chain(7)
ITEMS: list[StoreObject] = [*blocks_of(PROMPT), state(PROMPT, 1792)]
RAWS = [
    encode_prefix(item, fingerprint=FINGERPRINT, layout=LAYOUT) + bytes(item.payload)
    for item in ITEMS
]
SERVICE = "/penstock.kv.v1.KvStore/"
STEPS = [
    *["put"] * 4,
    *["put_cut", "get", "get_cut"] * 2,
    *["lease", "release", "flush", "kill", "kill_at"],
    *["refuse", "slow", "damage", "jump"],
]
SCHEDULES = st.lists(
    st.tuples(st.sampled_from(STEPS), st.integers(0, len(ITEMS) - 1), st.integers(0, 12)),
    min_size=3,
    max_size=12,
)


@pytest.fixture(scope="module")
def redis() -> Iterator[RedisServer]:
    with running_redis() as server:
        yield server


class Cluster:
    """One node, its clients, and what must be true of them whatever was killed."""

    def __init__(self, root: Path, switch: Switch, redis: RedisServer, jump: SimpleNamespace):
        self.folder, self.switch, self.redis, self.jump = root / "kv", switch, redis, jump
        self.config = StoreConfig(
            node_id="chaos",
            # Five objects in memory: eviction goes on all the time.
            memory_bytes=5 * max(map(len, RAWS)),
            disk_bytes=1 << 20,
            disk_extent_bytes=1 << 16,
            disk_dir=str(self.folder),
            disk_sync_s=0.02,
            chunk_bytes=1 << 10,
            redis_url=redis.url,
            heartbeat_s=0.05,
        )
        self.damaged = False

    async def start(self) -> None:
        self.switch.medium = Medium()
        begun = time.monotonic()
        self.server: StoreServer = await start_server(self.config)
        self.client = StoreClient(
            self.server.address, fingerprint=FINGERPRINT, layout=LAYOUT, index=self.redis.url
        )
        self.channel = grpc.aio.insecure_channel(self.server.address)
        await self.client.stat()
        assert time.monotonic() - begun < 5, "it serves again within 5 s"

    async def die(self) -> None:
        """As after kill -9: no goodbye on any wire, nothing more on the disk."""
        server, disk = self.server, self.server.node._disk
        assert disk is not None and server._announcing is not None
        self.switch.medium.kill()
        tasks = [server._announcing, *disk._tasks]
        for task in tasks:
            task.cancel()
        await server._server.stop(None)
        await asyncio.gather(*tasks, return_exceptions=True)
        disk._writer.shutdown()
        disk._readers.shutdown()
        disk._files.close()
        server._exporter.close()
        await server._index.close()
        await server._tracer.close()
        await self.client.close()
        await self.channel.close()

    async def kill(self, *_: int) -> None:
        """And all that was on disk is there again, to the byte."""
        disk = self.server.node._disk
        assert disk is not None
        await self.die()
        kept = [item for item in ITEMS if disk.catalog.entry(item.id) is not None]
        await self.start()
        await self.loaded()
        found = await fetch(self.client, [item.id for item in kept], owner="check")
        await self.client.release("check")
        for got, item in zip(found, kept, strict=True):
            assert same(got, item) or (self.damaged and isinstance(got, Missing))

    async def kill_at(self, number: int, cut: int) -> None:
        """The node dies at one of the next things that it does to its files."""
        medium = self.switch.medium
        medium.torn, medium.kill_at = cut / 12, medium.steps + cut % 4
        await self.put(number, 0)
        await self.get(number, 0)
        await asyncio.sleep(0.005 * (cut % 3))
        await self.kill()

    async def put(self, number: int, _: int) -> None:
        try:
            await self.client.put(ITEMS[number], owner="writer", lease_ttl_s=5)
        except OverloadedError:
            await self.client.release("reader")
        await self.client.release("writer")

    async def put_cut(self, number: int, cut: int) -> None:
        """A writer that goes away after message `cut`, having read no answer, or the first."""
        raw = RAWS[number]
        begin = kv_pb2.PutBegin(
            id=ITEMS[number].id, kind=1 if number < 7 else 2, size_bytes=len(raw), owner="cut"
        )
        messages = [
            kv_pb2.PutRequest(begin=begin).SerializeToString(),
            *(encode_data(raw[at : at + 512]) for at in range(0, len(raw), 512)),
            kv_pb2.PutRequest(commit=kv_pb2.PutCommit(digest=digest_now(raw))).SerializeToString(),
        ]
        call = self.channel.stream_stream(SERVICE + "Put")(timeout=1)
        with suppress(TimeoutError, grpc.aio.AioRpcError):
            async with asyncio.timeout(1):
                for message in messages if cut == 12 else messages[: cut + 1]:
                    await call.write(message)
                if cut % 2:
                    await call.read()
        call.cancel()

    async def get(self, number: int, _: int) -> None:
        for got, item in zip(
            await fetch(self.client, [ITEMS[number].id, ITEMS[0].id], owner="reader"),
            (ITEMS[number], ITEMS[0]),
            strict=True,
        ):
            assert isinstance(got, Missing) or same(got, item), "a wrong or partial object"

    async def get_cut(self, number: int, cut: int) -> None:
        """A reader that goes away after `cut` messages, or while it waits for a commit."""
        request = kv_pb2.GetRequest(
            ids=[item.id for item in ITEMS[number:]], owner="cut", lease_ttl_ms=200, wait_ms=50
        )
        call = self.channel.unary_stream(SERVICE + "Get")(request.SerializeToString(), timeout=1)
        # grpc.aio's client now and then never begins a call on a channel where one was cancelled.
        with suppress(TimeoutError, grpc.aio.AioRpcError):
            async with asyncio.timeout(1):
                for _ in range(cut):
                    if await call.read() is grpc.aio.EOF:
                        break
        call.cancel()

    async def lease(self, number: int, _: int) -> None:
        await self.client.lease([ITEMS[number].id], owner="reader", ttl_s=5)

    async def release(self, *_: int) -> None:
        await self.client.release("reader")

    async def flush(self, *_: int) -> None:
        self.redis.command(b"FLUSHALL")

    async def refuse(self, number: int, cut: int) -> None:
        medium = self.switch.medium
        medium.torn, medium.refuse_at = number / 7, range(medium.steps, medium.steps + cut)

    async def slow(self, _: int, cut: int) -> None:
        self.switch.medium.slow_s = cut / 2000

    async def jump_(self, number: int, cut: int) -> None:
        self.jump.ns += (cut - 6) * 3600 * 10**9 + number

    async def damage(self, number: int, cut: int) -> None:
        """Flipped bits in an extent under the node, or in its log while it is down."""
        rng = random.Random(number * 13 + cut)
        paths = sorted(path for path in self.folder.glob("*") if path.stat().st_size)
        if not paths:
            return
        self.damaged = True
        path = rng.choice(paths)
        with path.open("r+b") as file:
            at = rng.randrange(path.stat().st_size)
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 1 << rng.randrange(8)]))

    async def settled(self) -> None:
        """Nothing stays reserved, read or leased by those that have gone; the index knows all."""
        await self.client.release("reader")
        await self.client.release("writer")
        await self.client.release("cut")
        await until(self._is_idle, 5)
        self.server.node.release("cut")
        await self.loaded()
        await self.converged()
        found = await fetch(self.client, [item.id for item in ITEMS], owner="last")
        assert all(
            isinstance(got, Missing) or same(got, item)
            for got, item in zip(found, ITEMS, strict=True)
        )
        await self.client.release("last")
        assert self.server.node._catalog.usage().readers == 0
        stat = self.server.node.stat()
        assert (stat.leases, stat.disk_leases, stat.reserved_bytes) == (0, 0, 0)
        assert stat.used_bytes <= stat.capacity_bytes

    async def loaded(self) -> None:
        disk = self.server.node._disk
        assert disk is not None
        await until(lambda: disk.loaded, 5)

    async def converged(self) -> None:
        """Redis says of each object that the node has where it is; nothing has to be deleted."""
        index = RedisIndex(self.redis.url, lookup_timeout_s=1.0)
        node = self.server.node
        deadline = time.monotonic() + 10
        try:
            while True:
                held = [item.id for item in ITEMS if node.has([item.id])[0]]
                known = await index.lookup(held)
                if all(place is not None and place.epoch == node.epoch for place in known):
                    return
                assert time.monotonic() < deadline, "the index converges within 10 s"
                await asyncio.sleep(0.01)
        finally:
            await index.close()

    def _is_idle(self) -> bool:
        stat = self.server.node.stat()
        return (stat.reserved_bytes, stat.open_puts, stat.open_gets) == (0, 0, 0)


async def until(true: Any, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"it did not happen within {seconds} s"
        await asyncio.sleep(0.002)


@asynccontextmanager
async def cluster(
    switch: Switch, redis: RedisServer, jump: SimpleNamespace
) -> AsyncIterator[Cluster]:
    redis.command(b"FLUSHALL")
    with tempfile.TemporaryDirectory(prefix="penstock-chaos-") as root:
        made = Cluster(Path(root), switch, redis, jump)
        await made.start()
        try:
            yield made
        finally:
            await made.die()


def test_schedules(
    switch: Switch,
    redis: RedisServer,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    jump = SimpleNamespace(ns=0)
    clock = SimpleNamespace(monotonic=time.monotonic, time_ns=lambda: time.time_ns() + jump.ns)
    monkeypatch.setattr(node_module, "time", clock)
    monkeypatch.setattr(open_module, "Path", lambda folder: path_on(switch, Path(folder)))
    counts = dict.fromkeys(STEPS, 0)
    with asyncio.Runner() as runner:

        @bounded(request.config, 200)
        @given(steps=SCHEDULES)
        def schedule(steps: list[tuple[str, int, int]]) -> None:
            async def play() -> None:
                async with cluster(switch, redis, jump) as one:
                    for name, number, cut in steps:
                        counts[name] += 1
                        await getattr(one, "jump_" if name == "jump" else name)(number, cut)
                    await one.settled()

            runner.run(play())

        schedule()
    print(counts)
    assert min(counts.values()) > 5
