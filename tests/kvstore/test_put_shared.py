"""Objects that a writer writes into the node's memory itself, and writers that do not come back."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from kvstore import put_offers
from kvstore.arena import Arena, ArenaWriter, host_identity
from kvstore.client import StoreClient
from kvstore.codec import digest_now, encode_prefix
from kvstore.config import StoreConfig
from kvstore.contracts import Missing
from kvstore.server import StoreServer, start_server
from penstock.errors import OverloadedError
from protos.penstock.kv.v1 import kv_pb2
from tests.kvstore.objects import FINGERPRINT, block, chain, fetch, same
from tests.kvstore.test_shared_memory import LAYOUT, client_of
from tests.kvstore.test_store_contract import until

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="needs Linux's memfd")

CHAIN = chain(40)
ITEMS = [block(CHAIN, index, layout=LAYOUT) for index in range(40)]
IDS = [item.id for item in ITEMS]


@pytest.fixture(autouse=True)
def small_offers(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that several are on their way at once."""
    monkeypatch.setattr(put_offers, "OFFER_OBJECTS", 8)


@pytest.fixture
async def server() -> AsyncIterator[StoreServer]:
    running = await start_server(StoreConfig(memory_bytes=96 << 20))
    yield running
    await running.stop(0.1)


@pytest.fixture
async def client(server: StoreServer) -> AsyncIterator[StoreClient]:
    made = client_of(server.address)
    yield made
    await made.close()


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Offsets that were written to."""
    offsets: list[int] = []
    write = ArenaWriter.write

    def noted(self: ArenaWriter, offset: int, parts: Any) -> None:
        offsets.append(offset)
        write(self, offset, parts)

    monkeypatch.setattr(ArenaWriter, "write", noted)
    return offsets


async def call(server: StoreServer, name: str, request: Any, answer: Any) -> Any:
    async with grpc.aio.insecure_channel(server.address) as channel:
        method = channel.unary_unary(
            f"/penstock.kv.v1.KvStore/{name}",
            request_serializer=type(request).SerializeToString,
            response_deserializer=answer.FromString,
        )
        return await method(request)


def offer_of(*items: int, host: bytes | None = None) -> kv_pb2.OfferRequest:
    request = kv_pb2.OfferRequest(
        owner="w", lease_ttl_ms=9000, host=host_identity() if host is None else host
    )
    for place in items:
        size = len(raw_of(place))
        request.objects.add(id=IDS[place], kind=kv_pb2.OBJECT_KIND_BLOCK, size_bytes=size)
    return request


def raw_of(place: int) -> bytes:
    item = ITEMS[place]
    return encode_prefix(item, fingerprint=FINGERPRINT, layout=LAYOUT) + bytes(item.payload)


async def offered(server: StoreServer, *items: int) -> kv_pb2.OfferResponse:
    return await call(server, "Offer", offer_of(*items), kv_pb2.OfferResponse)


async def settled(
    server: StoreServer, offer: kv_pb2.OfferResponse, *digests: bytes
) -> list[kv_pb2.PutResponse]:
    request = kv_pb2.SettleRequest(ticket=offer.ticket, digests=digests)
    return list((await call(server, "Settle", request, kv_pb2.OfferResult)).answers)


async def test_a_writer_on_the_host_writes_into_the_nodes_memory(
    client: StoreClient, server: StoreServer, written: list[int]
) -> None:
    assert await client.put_many(ITEMS, owner="w", lease_ttl_s=30) == [True] * 40
    assert len(written) == 40
    assert await client.put_many(ITEMS, owner="w", lease_ttl_s=30) == [False] * 40
    assert len(written) == 40
    assert all(map(same, await fetch(client, IDS), ITEMS))
    far = client_of(server.address, share_memory=False)
    assert all(map(same, await fetch(far, IDS), ITEMS))
    assert await far.put(block(chain(1, seed=3), 0, layout=LAYOUT), owner="w", lease_ttl_s=9)
    assert len(written) == 40
    await far.close()
    stat = server.node.stat()
    assert (stat.objects, stat.reserved_bytes, stat.open_puts) == (41, 0, 0)


async def test_writers_side_by_side_and_readers_that_wait(
    client: StoreClient, server: StoreServer
) -> None:
    others = [client_of(server.address) for _ in range(3)]

    async def write(writer: StoreClient, first: int) -> None:
        for start in range(first, 40, 10):
            await writer.put_many(ITEMS[start : start + 15], owner=f"w{first}", lease_ttl_s=30)

    reading = asyncio.create_task(fetch(client, IDS, wait_s=20, ttl_s=60))
    await asyncio.gather(*(write(other, 3 * place) for place, other in enumerate(others)))
    await client.put_many(ITEMS, owner="w", lease_ttl_s=30)
    assert all(map(same, await reading, ITEMS))
    for other in others:
        await other.close()
    assert server.node.stat().reserved_bytes == 0


async def test_what_was_written_wrong_is_refused_and_counted(server: StoreServer) -> None:
    offer = await offered(server, 0, 1, 2)
    assert len(offer.places.offsets) == 3
    writer = ArenaWriter(offer.places.pid, offer.places.fd, offer.places.secret)
    for place, offset in enumerate(offer.places.offsets):
        writer.write(offset, [memoryview(raw_of(place))])
    writer.write(offer.places.offsets[1] + 1000, [memoryview(b"rotten")])
    answers = await settled(server, offer, *(digest_now(raw_of(place)) for place in range(3)))
    statuses = [kv_pb2.PutResponse.Status.Name(answer.status)[7:] for answer in answers]
    assert statuses == ["COMMITTED", "REFUSED", "COMMITTED"]
    assert server.node.stat().integrity_failures == 1
    assert server.node.has(IDS[:3]) == [True, False, True]
    assert server.node.stat().reserved_bytes == 0
    # A digest that fits bytes of another identity commits nothing either.
    swapped = await offered(server, 3)
    writer.write(swapped.places.offsets[0], [memoryview(raw_of(4))])
    (answer,) = await settled(server, swapped, digest_now(raw_of(4)))
    assert answer.status == kv_pb2.PutResponse.STATUS_REFUSED
    writer.close()


async def test_a_writer_that_does_not_come_back_leaves_nothing_and_harms_nobody(
    server: StoreServer, client: StoreClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert server.port is not None
    monkeypatch.setattr(server.port.tickets, "_ttl_s", 0.3)
    offer = await offered(server, 0, 1)
    writer = ArenaWriter(offer.places.pid, offer.places.fd, offer.places.secret)
    await until(lambda: server.node.stat().reserved_bytes == 0)
    assert await settled(server, offer, bytes(32), bytes(32)) == []
    # It writes all the same, late: its places are nobody's yet.
    await client.put_many(ITEMS, owner="w", lease_ttl_s=30)
    for offset in offer.places.offsets:
        writer.write(offset, [memoryview(b"\xff" * len(raw_of(0)))])
    assert all(map(same, await fetch(client, IDS), ITEMS))
    assert client.integrity_failures == 0
    writer.close()


async def test_tickets_for_memory_are_good_once_and_only_for_that(server: StoreServer) -> None:
    offer = await offered(server, 0)
    assert await settled(server, offer) == []
    assert server.node.stat().reserved_bytes == 0
    offer = await offered(server, 0)
    writer = ArenaWriter(offer.places.pid, offer.places.fd, offer.places.secret)
    writer.write(offer.places.offsets[0], [memoryview(raw_of(0))])
    digest = digest_now(raw_of(0))
    first, second = await asyncio.gather(
        settled(server, offer, digest), settled(server, offer, digest)
    )
    assert sorted(map(len, (first, second))) == [0, 1]
    assert await settled(server, kv_pb2.OfferResponse(ticket=b"?"), digest) == []
    # Who is on another host is not told where.
    far = await call(server, "Offer", offer_of(1, host=b"elsewhere"), kv_pb2.OfferResponse)
    assert not far.HasField("places") and far.ticket
    assert await settled(server, far, digest) == []
    writer.close()


async def test_memory_that_cannot_be_written_is_not_asked_for_again(
    server: StoreServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []

    def refuse(self: ArenaWriter, pid: int, *_: object) -> None:
        tried.append(pid)
        raise PermissionError("another user")

    monkeypatch.setattr(ArenaWriter, "__init__", refuse)
    client = client_of(server.address)
    assert await client.put_many(ITEMS[:3], owner="w", lease_ttl_s=30) == [True] * 3
    assert await client.put_many(ITEMS[3:6], owner="w", lease_ttl_s=30) == [True] * 3
    assert len(tried) == 1
    assert all(map(same, await fetch(client, IDS[:6]), ITEMS[:6]))
    assert server.node.stat().reserved_bytes == 0
    await client.close()


async def test_without_a_data_port_memory_still_serves(written: list[int]) -> None:
    running = await start_server(StoreConfig(memory_bytes=96 << 20, data_connections=0))
    near, far = client_of(running.address), client_of(running.address, share_memory=False)
    assert await near.put_many(ITEMS[:9], owner="w", lease_ttl_s=30) == [True] * 9
    assert len(written) == 9
    assert all(map(same, await fetch(far, IDS[:9]), ITEMS[:9]))
    assert await far.put_many(ITEMS[9:12], owner="w", lease_ttl_s=30) == [True] * 3
    assert running.node.stat().reserved_bytes == 0
    await near.close()
    await far.close()
    await running.stop(0.1)


async def test_a_full_store_refuses_and_keeps_what_came_before() -> None:
    running = await start_server(StoreConfig(memory_bytes=5 * len(raw_of(0)) + 1000))
    client = client_of(running.address)
    with pytest.raises(OverloadedError):
        await client.put_many(ITEMS[:8], owner="w", lease_ttl_s=30)
    assert await client.has(IDS[:8]) == [True] * 5 + [False] * 3
    assert Missing(IDS[6]) in await fetch(client, IDS[:8])
    await client.close()
    await running.stop(0.1)


def test_a_place_outside_the_arena_is_refused() -> None:
    arena = Arena(1 << 20)
    writer = ArenaWriter(os.getpid(), arena.fd, arena.secret)
    data = memoryview(bytes(100))
    for offset in (0, 10, 4095, 1 << 40, arena._size_bytes - 50):
        with pytest.raises(OSError):
            writer.write(offset, [data])
    writer.write(4096, [data])
    writer.close()
    writer.close()
    with pytest.raises(OSError):
        writer.write(4096, [data])


WRITER = """
import asyncio, sys
from kvstore import put_offers
from kvstore.arena import ArenaWriter
from tests.kvstore.test_put_shared import ITEMS, client_of
write = ArenaWriter.write
count = 0
def slow(self, offset, parts):
    global count
    count += 1
    if count == 5:
        write(self, offset, [parts[0]])
        print("half", flush=True)
        import time; time.sleep(60)
    write(self, offset, parts)
ArenaWriter.write = slow
async def main():
    await client_of(sys.argv[1]).put_many(ITEMS[:20], owner="gone", lease_ttl_s=2)
asyncio.run(main())
"""


async def test_a_writer_that_is_killed_leaves_nothing(
    server: StoreServer, client: StoreClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert server.port is not None
    monkeypatch.setattr(server.port.tickets, "_ttl_s", 1.0)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", WRITER, server.address, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    async with asyncio.timeout(20):
        assert await process.stdout.readline() == b"half\n"
    process.send_signal(signal.SIGKILL)
    await process.wait()
    await until(lambda: server.node.stat().reserved_bytes == 0)
    assert server.node.has(IDS[:20]) == [False] * 20
    assert await client.put_many(ITEMS[:20], owner="w", lease_ttl_s=30) == [True] * 20
    assert all(map(same, await fetch(client, IDS[:20]), ITEMS[:20]))
