"""Objects handed over in memory: the same as over the wire, and never anything else."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from kvstore.arena import RECYCLED_BYTES, ArenaReader, host_identity
from kvstore.client import StoreClient
from kvstore.config import StoreConfig
from kvstore.contracts import Missing
from kvstore.get_shared import COPY_BYTES, batches_of
from kvstore.server import StoreServer, start_server
from penstock.blocks import CacheLayout, Component, ComponentKind
from penstock.errors import OverloadedError, StoreUnavailableError
from protos.penstock.kv.v1 import kv_pb2
from tests.kvstore.objects import FINGERPRINT, block, chain, fetch, same
from tests.kvstore.test_process import node
from tests.kvstore.test_store_contract import until

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="needs Linux's memfd")

LAYOUT = CacheLayout((Component("rows.0", ComponentKind.COMPRESSED, 4, 4096),))
"""Blocks of 256 KiB."""
ITEMS = [block(chain(20), index, layout=LAYOUT) for index in range(20)]
IDS = [item.id for item in ITEMS]
GET = "/penstock.kv.v1.KvStore/Get"


def client_of(address: str, **options: Any) -> StoreClient:
    return StoreClient(address, fingerprint=FINGERPRINT, layout=LAYOUT, **options)


@pytest.fixture
async def server() -> AsyncIterator[StoreServer]:
    running = await start_server(StoreConfig(memory_bytes=8 << 20))
    yield running
    await running.stop(0.1)


@pytest.fixture
async def client(server: StoreServer) -> AsyncIterator[StoreClient]:
    made = client_of(server.address)
    await made.put_many(ITEMS, owner="writer", lease_ttl_s=30)
    yield made
    await made.close()


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of what was copied from shared memory."""
    sizes: list[int] = []
    copy = ArenaReader.copy

    def noted(self: ArenaReader, offset: int, size_bytes: int) -> memoryview:
        sizes.append(size_bytes)
        return copy(self, offset, size_bytes)

    monkeypatch.setattr(ArenaReader, "copy", noted)
    return sizes


async def test_workers_on_one_host_copy_objects_and_get_the_same(
    client: StoreClient, server: StoreServer, copied: list[int]
) -> None:
    asked = [*IDS[:7], bytes(32), *IDS[7:]]
    got = await fetch(client, asked)
    assert got[7] == Missing(bytes(32))
    del got[7]
    assert all(map(same, got, ITEMS))
    assert len(copied) == len(ITEMS)
    over_the_wire = client_of(server.address, share_memory=False)
    assert all(map(same, await fetch(over_the_wire, IDS), ITEMS))
    assert len(copied) == len(ITEMS)
    assert server.node.stat().bytes_out == 2 * server.node.stat().bytes_in
    await over_the_wire.close()


@pytest.mark.parametrize(
    ("host", "ttl_ms", "is_shared"),
    [
        (host_identity(), 1000, True),
        (host_identity(), 0, False),
        (bytes(32), 1000, False),
        (b"", 1000, False),
    ],
)
async def test_memory_is_offered_to_the_same_host_and_under_a_lease_only(
    client: StoreClient, server: StoreServer, host: bytes, ttl_ms: int, is_shared: bool
) -> None:
    request = kv_pb2.GetRequest(ids=IDS, owner="r", lease_ttl_ms=ttl_ms, host=host)
    async with grpc.aio.insecure_channel(server.address) as channel:
        call = channel.unary_stream(GET)(request.SerializeToString(), timeout=5)
        answers = [kv_pb2.GetResponse.FromString(raw) async for raw in call]
    kinds = {answer.WhichOneof("message") for answer in answers}
    assert kinds == {"shared"} if is_shared else kinds == {"start"}
    tickets = [ticket for answer in answers for ticket in answer.shared.objects]
    assert [ticket.id for ticket in tickets] == (IDS if is_shared else [])


async def test_what_has_come_is_not_kept_waiting_by_what_has_not(client: StoreClient) -> None:
    late = block(chain(1, seed=5), 0, layout=LAYOUT)
    stream = client.get([*IDS[:3], late.id], owner="r", lease_ttl_s=9, wait_s=20)
    async with asyncio.timeout(5):
        for item in ITEMS[:3]:
            assert same(await anext(stream), item)
        await client.put(late, owner="writer", lease_ttl_s=9)
        assert same(await anext(stream), late)


async def test_bytes_that_changed_before_they_were_copied_come_over_the_wire(
    client: StoreClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = ArenaReader.copy
    turns = iter(range(100))

    def torn(self: ArenaReader, offset: int, size_bytes: int) -> memoryview:
        turn = next(turns)
        if turn % 3 == 1:
            raise OSError("gone")
        data = copy(self, offset, size_bytes)
        data[turn] ^= turn % 3 == 0
        return data

    monkeypatch.setattr(ArenaReader, "copy", torn)
    assert all(map(same, await fetch(client, IDS), ITEMS))
    assert client.integrity_failures == 0


async def test_bytes_that_rot_in_the_node_are_missing(
    client: StoreClient, server: StoreServer
) -> None:
    arena = server.node._memory.arena
    assert arena is not None
    offset = arena.offset_of(server.node._memory.read(IDS[3]))
    assert offset is not None
    os.pwrite(arena.fd, b"rotten", offset + 1000)
    got = await fetch(client, IDS)
    assert got[3] == Missing(IDS[3])
    assert all(map(same, got[:3] + got[4:], ITEMS[:3] + ITEMS[4:]))
    assert client.integrity_failures == 1


async def test_memory_that_cannot_be_opened_is_not_asked_for_again(
    client: StoreClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []

    def refuse(self: ArenaReader, pid: int, *_: object) -> None:
        opened.append(pid)
        raise PermissionError("another user")

    monkeypatch.setattr(ArenaReader, "__init__", refuse)
    for _ in range(2):
        assert all(map(same, await fetch(client, IDS), ITEMS))
    assert opened == [os.getpid()]


@pytest.mark.parametrize(
    "shared",
    [
        kv_pb2.GetShared(),
        kv_pb2.GetShared(objects=[kv_pb2.SharedObject(id=IDS[1])]),
        kv_pb2.GetShared(objects=[kv_pb2.SharedObject(id=id_) for id_ in IDS[:2]]),
    ],
)
async def test_tickets_that_nobody_asked_for_are_an_error(shared: kv_pb2.GetShared) -> None:
    async def get(request: bytes, context: Any) -> AsyncIterator[bytes]:
        yield kv_pb2.GetResponse(shared=shared).SerializeToString()

    liar = grpc.aio.server()
    handlers = {"Get": grpc.unary_stream_rpc_method_handler(get)}
    liar.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("penstock.kv.v1.KvStore", handlers),)
    )
    port = liar.add_insecure_port("127.0.0.1:0")
    await liar.start()
    client = client_of(f"127.0.0.1:{port}")
    with pytest.raises(StoreUnavailableError, match="other ids"):
        await fetch(client, IDS[:1])
    await client.close()
    await liar.stop(0)


async def test_memory_that_evicted_objects_leave_is_used_again(
    server: StoreServer, client: StoreClient
) -> None:
    await client.release("writer")
    for seed in range(1, 7):
        items = [block(chain(20, seed), index, layout=LAYOUT) for index in range(20)]
        assert all(await client.put_many(items, owner="w", lease_ttl_s=9))
        assert all(map(same, await fetch(client, [item.id for item in items]), items))
        await client.release("w")
        await client.release("reader")
    arena, stat = server.node._memory.arena, server.node.stat()
    assert arena is not None and stat.evictions > 80
    assert arena.memory_bytes <= stat.used_bytes + RECYCLED_BYTES + (1 << 20)


def open_arenas() -> int:
    links = (link for link in Path("/proc/self/fd").iterdir() if link.is_symlink())
    return sum("penstock-kv" in os.path.realpath(link) for link in links)


def in_dev_shm() -> set[str]:
    folder = Path("/dev/shm")
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


async def test_a_node_that_is_killed_leaves_nothing_and_its_successor_is_read() -> None:
    before = open_arenas()
    named = in_dev_shm()
    with node("--listen", "127.0.0.1:0", "--memory", "10000000") as (process, address):
        client = client_of(address, call_timeout_s=2.0)
        await client.put_many(ITEMS, owner="w", lease_ttl_s=30)
        assert all(map(same, await fetch(client, IDS), ITEMS))
        assert open_arenas() == before + 2
        process.send_signal(signal.SIGKILL)
        await asyncio.to_thread(process.wait, 5)
        with pytest.raises(StoreUnavailableError):
            await fetch(client, IDS)
        with node("--listen", address, "--memory", "10000000"):
            async with asyncio.timeout(10):
                while True:
                    try:
                        await client.put_many(ITEMS, owner="w", lease_ttl_s=30)
                        found = await fetch(client, IDS)
                        break
                    except StoreUnavailableError:
                        await asyncio.sleep(0.1)
            assert all(map(same, found, ITEMS))
            # One mapping to read and one to write.
            assert open_arenas() == before + 2
        await client.close()
    assert open_arenas() == before
    assert not {name for name in in_dev_shm() - named if "penstock" in name}


READER = """
import asyncio, sys, time
from kvstore.client import StoreClient
from tests.kvstore.test_shared_memory import FINGERPRINT, IDS, LAYOUT
async def main():
    client = StoreClient(sys.argv[1], fingerprint=FINGERPRINT, layout=LAYOUT)
    async for item in client.get(IDS, owner="killed", lease_ttl_s=1.0):
        print("has one", flush=True)
        time.sleep(60)
asyncio.run(main())
"""


async def test_a_reader_that_is_killed_holds_nothing_once_its_lease_has_ended(
    server: StoreServer, client: StoreClient
) -> None:
    await client.release("writer")
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", READER, server.address, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    assert await process.stdout.readline() == b"has one\n"
    assert server.node.stat().lease_owners == 1
    process.kill()
    await process.wait()
    await until(lambda: server.node.stat().leases == 0, within_s=3)
    assert server.node.stat().open_gets == 0


def test_what_is_copied_in_one_piece_of_work_is_bounded() -> None:
    assert batches_of([5, 5, 5], most_bytes=10) == [range(2), range(2, 3)]
    assert batches_of([50, 5], most_bytes=10) == [range(1), range(1, 2)]
    assert batches_of([1], most_bytes=COPY_BYTES) == [range(1)]


async def test_a_system_without_memory_refuses_the_object_and_keeps_the_others(
    client: StoreClient, server: StoreServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int, data: memoryview, offset: int) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    late = block(chain(1, seed=6), 0, layout=LAYOUT)
    writer = client_of(server.address, use_data_port=False, share_memory=False)
    with monkeypatch.context() as patched:
        patched.setattr("kvstore.arena.os.pwrite", full)
        with pytest.raises(OverloadedError, match="no memory left"):
            await writer.put(late, owner="writer", lease_ttl_s=9)
    await writer.close()
    assert server.node.stat().reserved_bytes == 0
    assert await client.put(late, owner="writer", lease_ttl_s=9)
    assert all(map(same, await fetch(client, [*IDS, late.id]), [*ITEMS, late]))
