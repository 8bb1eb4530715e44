"""Objects over the data port: the same as over gRPC, through every fault of the connection."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import pytest

from cluster.tls.files import make
from kvstore.client import StoreClient
from kvstore.config import StoreConfig
from kvstore.contracts import Missing, StoreObject
from kvstore.data import port as data_port
from kvstore.data.frames import MAGIC, What
from kvstore.get_answers import GetAnswers
from kvstore.put_offers import offers
from kvstore.server import StoreServer, start_server
from kvstore.transfer import OpenGet
from penstock.blocks import CacheLayout, Component, ComponentKind
from penstock.errors import BlockIntegrityError, OverloadedError, StoreUnavailableError
from penstock.peers import Peers
from penstock.telemetry import catalog as M
from penstock.telemetry.meters import Meters
from protos.penstock.kv.v1 import kv_pb2
from tests.kvstore.data.proxy import Proxy, cut_at, flip_at, proxy
from tests.kvstore.objects import FINGERPRINT, block, chain, fetch, same
from tests.kvstore.test_store_contract import until

LAYOUT = CacheLayout((Component("rows.0", ComponentKind.COMPRESSED, 4, 40_000),))
"""Blocks of 2.56 MB: three chunks."""
ITEMS = [block(chain(6), index, layout=LAYOUT) for index in range(6)]
IDS = [item.id for item in ITEMS]
WHOLE = sum(len(item.payload) for item in ITEMS)
CALL = "/penstock.kv.v1.KvStore/"


def client_of(address: str, **options: Any) -> StoreClient:
    options = {"share_memory": False, "call_timeout_s": 2.0, **options}
    return StoreClient(address, fingerprint=FINGERPRINT, layout=LAYOUT, **options)


@pytest.fixture
async def server() -> AsyncIterator[StoreServer]:
    running = await start_server(StoreConfig(memory_bytes=64 << 20))
    yield running
    await running.stop(0.1)


@pytest.fixture
def way(server: StoreServer) -> Iterator[Proxy]:
    """What clients of `server` are sent through."""
    assert server.port is not None
    with proxy(server.port.port) as made:
        server.port.port = made.port
        yield made


@pytest.fixture
def meters() -> Meters:
    return Meters("decode")


@pytest.fixture
async def client(server: StoreServer, meters: Meters) -> AsyncIterator[StoreClient]:
    made = client_of(server.address, meter=meters)
    yield made
    await made.close()


def fallbacks(meters: Meters) -> set[str]:
    lines = meters.text().decode().splitlines()
    name = "penstock_" + M.DATA_FALLBACKS.name
    return {
        line.split('reason="')[1].split('"')[0] for line in lines if line.startswith(name + "{")
    }


def refusals(server: StoreServer) -> list[str]:
    assert server.port is not None
    seen: list[str] = []
    server.port.on_refused(seen.append)
    return seen


async def test_bytes_take_the_data_port_and_nothing_else(
    client: StoreClient, server: StoreServer, way: Proxy, meters: Meters
) -> None:
    assert await client.put_many(ITEMS, owner="w", lease_ttl_s=30) == [True] * 6
    assert WHOLE < way.carried < WHOLE * 1.01
    assert await client.put_many(ITEMS, owner="w", lease_ttl_s=30) == [False] * 6
    assert way.carried < WHOLE * 1.01
    assert all(map(same, await fetch(client, IDS), ITEMS))
    assert 2 * WHOLE < way.carried < 2 * WHOLE * 1.01
    # One connection serves one call after the other.
    assert way.connections == 1
    assert not fallbacks(meters)
    stat = server.node.stat()
    assert (stat.reserved_bytes, stat.open_puts, stat.objects) == (0, 0, 6)
    assert client.integrity_failures == 0


async def test_many_at_once_come_whole_and_in_order(
    client: StoreClient, server: StoreServer, meters: Meters
) -> None:
    async def turn(number: int) -> None:
        if number % 2:
            await client.put_many(ITEMS, owner=f"w{number}", lease_ttl_s=30)
        found = await fetch(client, IDS, owner=f"r{number}", wait_s=10)
        assert all(map(same, found, ITEMS))

    await asyncio.gather(*(turn(number) for number in range(24)))
    await until(lambda: server.node.stat().open_gets == 0)
    assert server.node.stat().reserved_bytes == 0
    assert fallbacks(meters) <= {"busy"}


async def test_what_is_missing_in_between_is_said_and_waited_for(client: StoreClient) -> None:
    await client.put_many(ITEMS[:2], owner="w", lease_ttl_s=30)
    found = await fetch(client, [IDS[0], IDS[5], IDS[1]])
    assert same(found[0], ITEMS[0]) and same(found[2], ITEMS[1])
    assert found[1] == Missing(IDS[5])

    async def late() -> None:
        await asyncio.sleep(0.2)
        await client.put(ITEMS[5], owner="w", lease_ttl_s=30)

    task = asyncio.create_task(late())
    assert all(map(same, await fetch(client, [IDS[1], IDS[5]], wait_s=5), [ITEMS[1], ITEMS[5]]))
    await task


@pytest.mark.parametrize("offset", [0, 20, 60, 900_000, 2_000_000, 5_000_000, 9_000_000])
async def test_a_get_that_is_cut_goes_on_where_it_was(
    client: StoreClient,
    server: StoreServer,
    way: Proxy,
    meters: Meters,
    monkeypatch: pytest.MonkeyPatch,
    offset: int,
) -> None:
    await client.put_many(ITEMS, owner="w", lease_ttl_s=30)
    starts: list[int] = []
    resumed = GetAnswers._resumed

    def noted(self: GetAnswers, found: OpenGet) -> int:
        starts.append(resumed(self, found))
        return starts[-1]

    monkeypatch.setattr(GetAnswers, "_resumed", noted)
    way.close()
    assert server.port is not None
    with proxy(way.target) as bad:
        server.port.port = bad.port
        bad.to_client = cut_at(offset)
        assert all(map(same, await fetch(client, IDS), ITEMS))
    assert fallbacks(meters) == {"cut"}
    assert client.integrity_failures == 0
    # Of the object at which it was cut, whole chunks are not sent again.
    assert starts[0] == 0 and starts[1] <= offset % len(ITEMS[0].payload)
    assert starts[1] > offset % len(ITEMS[0].payload) - 1_000_000
    await until(lambda: server.node.stat().open_gets == 0)


@pytest.mark.parametrize("offset", [3, 20, 36, 39, 45, 900_000, 2_570_000, 5_000_000, 15_000_000])
async def test_a_put_that_is_cut_is_done_over_grpc(
    client: StoreClient, server: StoreServer, way: Proxy, meters: Meters, offset: int
) -> None:
    way.to_node = cut_at(offset)
    await client.put_many(ITEMS, owner="w", lease_ttl_s=30)
    assert fallbacks(meters) == {"cut"}
    assert all(map(same, await fetch(client, IDS), ITEMS))
    stat = server.node.stat()
    assert (stat.objects, stat.reserved_bytes, stat.open_puts) == (6, 0, 0)


@pytest.mark.parametrize("offset", [5, 50, 100_000, 1_500_000, 2_570_000])
async def test_damage_on_the_way_never_arrives(
    client: StoreClient, server: StoreServer, way: Proxy, meters: Meters, offset: int
) -> None:
    refused = refusals(server)
    way.to_node = flip_at(offset)
    with suppress(BlockIntegrityError):
        await client.put_many(ITEMS, owner="w", lease_ttl_s=30)
    assert fallbacks(meters) or server.node.stat().integrity_failures
    await until(lambda: server.node.stat().reserved_bytes == 0)
    server.port.port = way.target
    await asyncio.sleep(0)
    other = client_of(server.address)
    await other.put_many(ITEMS, owner="w", lease_ttl_s=30)
    assert all(map(same, await fetch(other, IDS), ITEMS))
    with proxy(way.target) as bad:
        server.port.port = bad.port
        bad.to_client = flip_at(offset)
        third = client_of(server.address)
        found = await fetch(third, IDS)
        for item, expected in zip(found, ITEMS, strict=True):
            assert same(item, expected) or isinstance(item, Missing)
        assert sum(isinstance(item, StoreObject) for item in found) >= 5
        await third.close()
    await other.close()
    assert set(refused) <= {"damaged", "garbage", "magic", "ticket", "cut"}


async def test_a_data_port_that_cannot_be_reached_costs_one_try(
    client: StoreClient, server: StoreServer, meters: Meters
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        dead = taken.getsockname()[1]
    assert server.port is not None
    server.port.port = dead
    assert await client.put_many(ITEMS, owner="w", lease_ttl_s=30) == [True] * 6
    assert all(map(same, await fetch(client, IDS), ITEMS))
    assert fallbacks(meters) == {"unreachable"}
    assert "} 1.0" in next(
        line for line in meters.text().decode().splitlines() if 'reason="unreachable"' in line
    )
    assert server.node.stat().reserved_bytes == 0


async def test_a_node_without_data_port_is_served_over_grpc(meters: Meters) -> None:
    running = await start_server(StoreConfig(memory_bytes=64 << 20, data_connections=0))
    client = client_of(running.address, meter=meters)
    assert running.port is None
    assert await client.put_many(ITEMS, owner="w", lease_ttl_s=30) == [True] * 6
    assert all(map(same, await fetch(client, IDS), ITEMS))
    await client.close()
    await running.stop(0.1)


async def test_a_full_store_refuses_and_keeps_what_came_before() -> None:
    running = await start_server(StoreConfig(memory_bytes=4 * len(ITEMS[0].payload)))
    client = client_of(running.address)
    with pytest.raises(OverloadedError):
        await client.put_many(ITEMS, owner="w", lease_ttl_s=30)
    assert await client.has(IDS) == [True] * 3 + [False] * 3
    assert running.node.stat().reserved_bytes == 0
    await client.close()
    await running.stop(0.1)


async def test_a_reader_that_leaves_and_one_that_takes_its_time(
    client: StoreClient, server: StoreServer
) -> None:
    await client.put_many(ITEMS, owner="w", lease_ttl_s=30)
    stream = client.get(IDS, owner="r", lease_ttl_s=10)
    assert same(await anext(stream), ITEMS[0])
    await stream.aclose()
    await until(lambda: server.node.stat().open_gets == 0)
    found = []
    async for item in client.get(IDS, owner="r", lease_ttl_s=10):
        await asyncio.sleep(0.05)
        found.append(item)
    assert all(map(same, found, ITEMS))


async def test_a_writer_that_is_cancelled_leaves_nothing_reserved(
    client: StoreClient, server: StoreServer, way: Proxy
) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def stall(data: bytes, at: int) -> bytes:
        if at > 3_000_000 and not stop.is_set():
            loop.call_soon_threadsafe(stop.set)
            asyncio.run(asyncio.sleep(0.3))
        return data

    way.to_node = stall
    putting = asyncio.create_task(client.put_many(ITEMS, owner="w", lease_ttl_s=30))
    await stop.wait()
    assert server.node.stat().reserved_bytes > 0
    putting.cancel()
    await asyncio.gather(putting, return_exceptions=True)
    await until(lambda: server.node.stat().reserved_bytes == 0)


async def test_a_frozen_node_is_given_up_in_time(client: StoreClient, way: Proxy) -> None:
    await client.put_many(ITEMS, owner="w", lease_ttl_s=30)
    loop = asyncio.get_running_loop()
    way.to_client = lambda data, at: asyncio.run(asyncio.sleep(4)) or data
    begun = loop.time()
    assert all(map(same, await fetch(client, IDS), ITEMS))
    assert loop.time() - begun < 3.5


async def test_strangers_learn_nothing_and_are_counted(
    server: StoreServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_port, "HELLO_S", 0.3)
    refused = refusals(server)
    assert server.port is not None

    async def answer(said: bytes, *, ends: bool = False) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port.port)
        writer.write(said)
        if ends:
            writer.write_eof()
        try:
            return await asyncio.wait_for(reader.read(), 3)
        except ConnectionError:
            return b""
        finally:
            writer.close()

    for said, reason in (
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "magic"),
        (b"\x16\x03\x01" + bytes(300), "magic"),
        (MAGIC + bytes([What.GET]) + bytes(32), "ticket"),
        (MAGIC + bytes([What.PUT]) + bytes(32), "ticket"),
        (MAGIC + bytes([7]) + bytes(32), "magic"),
        (MAGIC[:2], "silent"),
        (b"", "silent"),
    ):
        refused.clear()
        assert await answer(said) == b""
        await until(lambda: refused == [reason])  # noqa: B023
    assert await answer(b"", ends=True) == b""
    await until(lambda: server.port.connections == 0)


async def test_more_connections_than_allowed_are_hung_up() -> None:
    running = await start_server(StoreConfig(memory_bytes=64 << 20, data_connections=2))
    refused = refusals(running)
    assert running.port is not None
    held = [await asyncio.open_connection("127.0.0.1", running.port.port) for _ in range(2)]
    await until(lambda: running.port.connections == 2)
    client = client_of(running.address)
    assert await client.put_many(ITEMS[:2], owner="w", lease_ttl_s=30) == [True, True]
    assert refused == ["full"]
    for _, writer in held:
        writer.close()
    await client.close()
    await running.stop(0.1)


async def test_a_ticket_is_good_once_for_its_purpose_and_not_for_long(
    server: StoreServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = refusals(server)
    assert server.port is not None
    monkeypatch.setattr(server.port.tickets, "_ttl_s", 0.5)
    begin = kv_pb2.PutBegin(id=IDS[0], kind=kv_pb2.OBJECT_KIND_BLOCK, size_bytes=100_000)
    offer = kv_pb2.OfferRequest(owner="w", objects=[begin] * 3)
    async with grpc.aio.insecure_channel(server.address) as channel:
        call = channel.unary_unary(
            CALL + "Offer",
            request_serializer=kv_pb2.OfferRequest.SerializeToString,
            response_deserializer=kv_pb2.OfferResponse.FromString,
        )
        late, wrong, withdrawn = [await call(offer) for _ in range(3)]
        assert server.node.stat().reserved_bytes == 900_000
        await call(kv_pb2.OfferRequest(withdraw=[withdrawn.ticket, b"?"]))
        assert server.node.stat().reserved_bytes == 600_000
        with socket.create_connection(("127.0.0.1", server.port.port)) as peer:
            peer.sendall(MAGIC + bytes([What.GET]) + wrong.ticket)
            assert await asyncio.to_thread(peer.recv, 1) == b""
        await until(lambda: server.node.stat().reserved_bytes == 0)
        with socket.create_connection(("127.0.0.1", server.port.port)) as peer:
            peer.sendall(MAGIC + bytes([What.PUT]) + late.ticket)
            assert await asyncio.to_thread(peer.recv, 1) == b""
        await until(lambda: refused == ["ticket", "ticket"])
        assert len(server.port.tickets) == 0
        with pytest.raises(grpc.aio.AioRpcError):
            await call(kv_pb2.OfferRequest(owner="w", objects=[begin] * 65))


async def test_a_node_that_ends_mid_stream_is_said_to_be_away(
    way: Proxy, server: StoreServer
) -> None:
    client = client_of(server.address)
    await client.put_many(ITEMS, owner="w", lease_ttl_s=30)
    stream = client.get(IDS, owner="r", lease_ttl_s=10)
    with pytest.raises(StoreUnavailableError):
        async for _ in stream:
            way.close()
            await server.stop(0)
    with pytest.raises(StoreUnavailableError):
        await client.put_many(ITEMS, owner="w", lease_ttl_s=30)
    await client.close()


async def test_with_certificates_the_data_port_asks_for_one(tmp_path: Path) -> None:
    for name in ("ours", "theirs"):
        (tmp_path / name).mkdir()
        make(tmp_path / name, ("127.0.0.1",), days=2, authority_days=2)

    def peers(name: str) -> Peers:
        files = {kind: str(tmp_path / name / f"cluster.{kind[0:3]}") for kind in ("key",)}
        return Peers(
            ca=str(tmp_path / name / "ca.crt"),
            cert=str(tmp_path / name / "cluster.crt"),
            key=files["key"],
            cluster_token_file=str(tmp_path / "ours" / "cluster.token"),
        )

    running = await start_server(StoreConfig(memory_bytes=64 << 20), peers("ours"))
    refused = refusals(running)
    assert running.port is not None
    meters = Meters("decode")
    client = client_of(running.address, peers=peers("ours"), meter=meters)
    await client.put_many(ITEMS, owner="w", lease_ttl_s=30)
    assert all(map(same, await fetch(client, IDS), ITEMS))
    assert not fallbacks(meters) and not refused
    # Without a certificate, or with one of another authority: hung up before a word.
    with socket.create_connection(("127.0.0.1", running.port.port)) as peer:
        peer.sendall(MAGIC + bytes([What.GET]) + bytes(32))
        peer.settimeout(5)
        with suppress(ConnectionError):
            assert MAGIC not in await asyncio.to_thread(peer.recv, 100)
    await until(lambda: refused == ["tls"])
    stranger = client_of(running.address, peers=peers("theirs"))
    with pytest.raises(StoreUnavailableError):
        await stranger.put_many(ITEMS, owner="w", lease_ttl_s=30)
    await stranger.close()
    await client.close()
    await running.stop(0.1)


def test_offers_are_bounded_in_number_and_bytes() -> None:
    many = [ITEMS[0]] * 200
    parts = offers(many)
    assert sum(map(len, parts)) == 200
    assert all(len(part) <= 64 for part in parts)
    assert all(sum(len(item.payload) for item in part) <= 32 << 20 for part in parts)
    assert [len(part) for part in offers(many[:1])] == [1]
