"""A node with a disk tier, through its own doors: eviction, restart, kill, damage, a sick disk."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from kvstore.client import StoreClient
from kvstore.config import StoreConfig, StoreSpec
from kvstore.contracts import Missing, StoreObject
from kvstore.disk.files import DiskFiles
from kvstore.fake import MemoryBlockStore
from kvstore.node import StoreNode
from kvstore.server import start_server
from penstock.errors import UsageError
from tests.kvstore.objects import FINGERPRINT, LAYOUT, block, blocks_of, chain, fetch, same, state

OBJECT_BYTES = LAYOUT.block_bytes + 600
EXTENT_BYTES = 1 << 16


def config(folder: Path, *, memory_objects: int = 4, disk_extents: int = 16) -> StoreConfig:
    return StoreConfig(
        memory_bytes=memory_objects * OBJECT_BYTES,
        disk_bytes=disk_extents * EXTENT_BYTES,
        disk_extent_bytes=EXTENT_BYTES,
        disk_dir=str(folder),
        disk_sync_s=0.05,
    )


@asynccontextmanager
async def running(settings: StoreConfig) -> AsyncIterator[tuple[StoreNode, MemoryBlockStore]]:
    node = StoreNode(settings)
    await node.start()
    try:
        yield node, MemoryBlockStore(fingerprint=FINGERPRINT, layout=LAYOUT, node=node)
    finally:
        await node.close()


async def until(true: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not happen"
        await asyncio.sleep(0.01)


def damage(folder: Path, offset: int) -> None:
    """Flip a bit of the second of two objects: `offset` into it, or before its end."""
    (extent,) = folder.glob("extent-*.kv")
    raw = bytearray(extent.read_bytes())
    raw[offset if offset < 0 else len(raw) // 2 + offset] ^= 1
    extent.write_bytes(raw)


async def on_disk(client: StoreClient, objects: int) -> None:
    async with asyncio.timeout(20):
        while (await client.stat()).disk_objects < objects:  # noqa: ASYNC110 - another process
            await asyncio.sleep(0.05)


async def put_all(node: StoreNode, store: MemoryBlockStore, items: list[StoreObject]) -> None:
    """Committed, released, and on disk."""
    before = node.stat().disk_objects
    for number, item in enumerate(items):
        assert await store.put(item, owner="writer", lease_ttl_s=60)
        await store.release("writer")
        await until(lambda number=number: node.stat().disk_objects == before + number + 1)  # type: ignore[misc]


async def test_what_memory_evicts_is_served_from_disk(tmp_path: Path) -> None:
    items = blocks_of(chain(12))
    async with running(config(tmp_path)) as (node, store):
        await put_all(node, store, items)
        assert node.stat().objects <= 4 and node.stat().disk_objects == 12
        assert await store.has([item.id for item in items]) == [True] * 12
        found = await fetch(store, [item.id for item in items], ttl_s=0)
        assert all(same(got, item) for got, item in zip(found, items, strict=True))
        stat = node.stat()
        assert stat.disk_hits >= 8 and stat.misses == 0
        assert stat.used_bytes <= stat.capacity_bytes


async def test_states_and_blocks_are_there_again_after_a_restart(tmp_path: Path) -> None:
    of = chain(5)
    items = [*blocks_of(of), state(of, 1280)]
    async with running(config(tmp_path)) as (node, store):
        await put_all(node, store, items)
    async with running(config(tmp_path)) as (node, store):
        await until(lambda: node.stat().disk_objects == 6)
        found = await fetch(store, [item.id for item in items])
        assert all(same(got, item) for got, item in zip(found, items, strict=True))


async def test_rolling_objects_never_reach_the_disk(tmp_path: Path) -> None:
    of = chain(2)
    async with running(config(tmp_path)) as (node, store):
        await store.put(state(of, 256), owner="a", lease_ttl_s=60, rolling=True)
        await put_all(node, store, [block(of, 0)])
        assert node.stat().disk_objects == 1
        # Put as a lasting one after all, it follows.
        await store.put(state(of, 256), owner="a", lease_ttl_s=60)
        await until(lambda: node.stat().disk_objects == 2)


async def test_a_lease_protects_an_object_that_is_only_on_disk(tmp_path: Path) -> None:
    small = config(tmp_path, disk_extents=8)
    fits = int((small.disk_bytes - EXTENT_BYTES) * 0.75) // OBJECT_BYTES
    kept = blocks_of(chain(6, seed=1))
    async with running(small) as (node, store):
        await put_all(node, store, [*kept, *blocks_of(chain(4, seed=3))])
        ids = [item.id for item in kept]
        assert await store.lease(ids, owner="reader", ttl_s=60) == [True] * 6
        for item in blocks_of(chain(2 * fits, seed=2)):
            await store.put(item, owner="other", lease_ttl_s=60)
            await store.release("other")
            await until(lambda: node.stat().disk_queued_bytes == 0)
        assert node.stat().disk_evictions > 0
        found = await fetch(store, ids, owner="reader")
        assert all(same(got, item) for got, item in zip(found, kept, strict=True))
        assert node.stat().disk_used_bytes <= node.stat().disk_capacity_bytes
        await store.release("reader")
        assert (node.stat().leases, node.stat().disk_leases) == (0, 0)


@pytest.mark.parametrize("offset", [0, 3, 40, 200, 700, -1])
async def test_a_flipped_bit_is_a_counted_miss_and_can_be_put_again(
    tmp_path: Path, offset: int
) -> None:
    items = blocks_of(chain(2))
    async with running(config(tmp_path)) as (node, store):
        await put_all(node, store, items)
    damage(tmp_path, offset)
    async with running(config(tmp_path)) as (node, store):
        await until(lambda: node.stat().disk_objects == 2)
        good, bad = await fetch(store, [item.id for item in items])
        assert same(good, items[0]) and isinstance(bad, Missing)
        stat = node.stat()
        assert (stat.disk_quarantined, stat.disk_objects) == (1, 1)
        assert await store.has([items[1].id]) == [False]
        assert await store.put(items[1], owner="a", lease_ttl_s=60)
        await until(lambda: node.stat().disk_objects == 2)
        assert same((await fetch(store, [items[1].id]))[0], items[1])


async def test_many_readers_of_one_damaged_object_all_miss(tmp_path: Path) -> None:
    first, item = blocks_of(chain(2))
    async with running(config(tmp_path)) as (node, store):
        await put_all(node, store, [first, item])
    damage(tmp_path, 0)
    async with running(config(tmp_path)) as (node, store):
        await until(lambda: node.stat().disk_objects == 2)
        readers = (fetch(store, [item.id], owner=f"r{number}") for number in range(8))
        assert all(isinstance(got, Missing) for (got,) in await asyncio.gather(*readers))
        for number in range(8):
            await store.release(f"r{number}")
        assert (node.stat().disk_leases, node.stat().disk_objects) == (0, 1)


@pytest.mark.parametrize("fault", [OSError(28, "No space left on device"), KeyError("a bug")])
async def test_a_disk_that_refuses_costs_nothing_but_its_objects(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    items = blocks_of(chain(3))

    def full(*_: Any) -> None:
        raise fault

    async with running(config(tmp_path)) as (node, store):
        monkeypatch.setattr(DiskFiles, "write", full)
        await store.put(items[0], owner="a", lease_ttl_s=60)
        await until(lambda: node.stat().disk_errors == 1)
        await store.put(items[1], owner="a", lease_ttl_s=60)
        stat = node.stat()
        assert stat.disk_skipped == 2, "the second one met a tier that rests"
        assert (stat.disk_objects, stat.disk_queued_bytes) == (0, 0)
        assert same((await fetch(store, [items[0].id]))[0], items[0])
        monkeypatch.undo()
        await asyncio.sleep(1.1)
        await store.put(items[2], owner="a", lease_ttl_s=60)
        await until(lambda: node.stat().disk_objects == 1)


async def test_a_slow_disk_delays_nobody_and_its_queue_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = DiskFiles.write

    def slow(self: DiskFiles, *arguments: Any) -> Any:
        time.sleep(0.3)
        return real(self, *arguments)

    monkeypatch.setattr(DiskFiles, "write", slow)
    settings = config(tmp_path, memory_objects=40).model_copy(
        update={"disk_queue_bytes": 3 * OBJECT_BYTES}
    )
    async with running(settings) as (node, store):
        for item in blocks_of(chain(20)):
            await store.put(item, owner="a", lease_ttl_s=60)
            assert node.stat().disk_queued_bytes <= 3 * OBJECT_BYTES
        assert node.stat().disk_skipped > 0 and node.stat().objects == 20


async def test_a_folder_in_use_is_refused_by_name(tmp_path: Path) -> None:
    settings = config(tmp_path).model_copy(update={"listen": "127.0.0.1:0"})
    server = await start_server(settings)
    try:
        with pytest.raises(UsageError, match="another store node uses"):
            await start_server(settings)
    finally:
        await server.stop(0.1)


async def test_a_killed_process_serves_what_it_had_written(tmp_path: Path) -> None:
    spec = StoreSpec(**config(tmp_path).model_dump())
    items = blocks_of(chain(8))

    def start() -> tuple[subprocess.Popen[str], StoreClient]:
        process = subprocess.Popen(
            [sys.executable, "-m", "kvstore", "--config-stdin"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=dict(os.environ),
        )
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(spec.model_dump_json() + "\n")
        process.stdin.flush()
        address = process.stdout.readline().split()[1]
        return process, StoreClient(address, fingerprint=FINGERPRINT, layout=LAYOUT, index=None)

    process, client = start()
    for item in items:
        await client.put(item, owner="w", lease_ttl_s=60)
        await client.release("w")
    await on_disk(client, 8)
    process.send_signal(signal.SIGKILL)
    process.wait()
    await client.close()
    process, client = start()
    try:
        await on_disk(client, 8)
        found = await fetch(client, [item.id for item in items])
        assert all(same(got, item) for got, item in zip(found, items, strict=True))
    finally:
        await client.close()
        process.kill()
        process.wait()
