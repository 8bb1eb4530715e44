"""The node against clients that break the rules, and the client against nodes that do."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest

from kvstore.client import StoreClient
from kvstore.codec import digest_now, encode_prefix
from kvstore.config import StoreConfig
from kvstore.contracts import Missing
from kvstore.server import StoreServer, start_server
from kvstore.wire import encode_data, encode_first, slices
from penstock.errors import OverloadedError, PenstockError, StoreUnavailableError
from protos.penstock.kv.v1 import kv_pb2
from tests.kvstore.objects import FINGERPRINT, LAYOUT, block, blocks_of, chain, fetch, same
from tests.kvstore.test_store_contract import until

SERVICE = "/penstock.kv.v1.KvStore/"
ITEM = block(chain(1), 0)
RAW = encode_prefix(ITEM, fingerprint=FINGERPRINT, layout=LAYOUT) + bytes(ITEM.payload)
CONFIG = StoreConfig(
    memory_bytes=1 << 20,
    max_object_bytes=1 << 18,
    put_idle_s=0.3,
    get_stall_s=0.5,
    max_lease_ttl_s=0.5,
    max_open_puts=3,
    max_open_gets=3,
    max_message_bytes=1 << 16,
    chunk_bytes=1 << 12,
)


@pytest.fixture
async def server() -> AsyncIterator[StoreServer]:
    running = await start_server(CONFIG)
    yield running
    await running.stop(0.1)


@pytest.fixture
async def channel(server: StoreServer) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(server.address) as opened:
        yield opened


@pytest.fixture
async def client(server: StoreServer) -> AsyncIterator[StoreClient]:
    made = StoreClient(server.address, fingerprint=FINGERPRINT, layout=LAYOUT)
    yield made
    await made.close()


def begin_fields(**change: Any) -> bytes:
    facts: dict[str, Any] = {
        "id": ITEM.id,
        "kind": kv_pb2.OBJECT_KIND_BLOCK,
        "size_bytes": len(RAW),
        "owner": "w",
        "lease_ttl_ms": 1000,
    }
    return kv_pb2.PutBegin(**facts | change).SerializeToString()


def begin(**change: Any) -> bytes:
    fields = kv_pb2.PutBegin.FromString(begin_fields(**change))
    return kv_pb2.PutRequest(begin=fields).SerializeToString()


def commit(digest: bytes | None = None) -> bytes:
    digest = digest_now(RAW) if digest is None else digest
    return kv_pb2.PutRequest(commit=kv_pb2.PutCommit(digest=digest)).SerializeToString()


async def put_raw(channel: Any, messages: list[bytes]) -> list[kv_pb2.PutResponse]:
    """Sends the messages, closes the sending side, reads everything."""
    call = channel.stream_stream(SERVICE + "Put")(iter(messages), timeout=5)
    return [kv_pb2.PutResponse.FromString(raw) async for raw in call]


@pytest.mark.parametrize(
    ("messages", "sentence"),
    [
        ([b"\xff\xff"], "no PutRequest"),
        ([b""], "holds none of"),
        ([encode_data(b"x")], "data without begin"),
        ([commit()], "commit without begin"),
        ([begin(), begin()], "begin inside an object"),
        ([begin(), encode_data(RAW[:5])], "ended inside an object"),
    ],
)
async def test_a_put_that_breaks_the_stream_s_rules_ends_in_a_sentence(
    server: StoreServer, channel: Any, messages: list[bytes], sentence: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match=sentence) as caught:
        await put_raw(channel, messages)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert server.node.stat().reserved_bytes == 0


@pytest.mark.parametrize(
    ("messages", "sentence"),
    [
        ([begin(id=b"x"), encode_data(RAW), commit()], "32 bytes"),
        ([begin(kind=0), encode_data(RAW), commit()], "neither block nor state"),
        ([begin(kind=77), encode_data(RAW), commit()], "neither block nor state"),
        ([begin(size_bytes=0)], "takes 1 to"),
        ([begin(size_bytes=1 << 40)], "takes 1 to"),
        ([begin(owner="")], "needs an owner"),
        ([begin(), encode_data(RAW + b"x"), commit()], "more data than"),
        ([begin(), encode_data(RAW[1:]), commit()], "commit after"),
        ([begin(), encode_data(RAW), commit(b"short")], "digest has 32 bytes"),
        ([begin(), encode_data(RAW), commit(bytes(32))], "do not match the digest"),
        ([begin(id=bytes(32)), encode_data(RAW), commit()], "does not match its reservation"),
    ],
)
async def test_a_wrong_object_is_refused_and_the_next_one_on_the_stream_is_not(
    server: StoreServer, channel: Any, messages: list[bytes], sentence: str
) -> None:
    answers = await put_raw(channel, [*messages, begin(), encode_data(RAW), commit()])
    refused = [one for one in answers if one.status == kv_pb2.PutResponse.STATUS_REFUSED]
    assert len(refused) == 1
    assert sentence in refused[0].error_message
    assert refused[0].error_code
    assert answers[-1].status == kv_pb2.PutResponse.STATUS_COMMITTED
    assert server.node.stat().reserved_bytes == 0


@pytest.mark.parametrize("pieces", [1, 2, 3])
async def test_an_object_whose_begin_has_its_digest_is_committed_by_its_last_byte(
    server: StoreServer, channel: Any, pieces: int
) -> None:
    first, *rest = slices(memoryview(RAW), -(-len(RAW) // pieces))
    assert len(rest) == pieces - 1
    whole = [encode_first(begin_fields(digest=digest_now(RAW)), [first[:3], first[3:]])]
    whole += map(encode_data, rest)
    answers = await put_raw(channel, [*whole, *whole])
    assert [one.status for one in answers] == [
        kv_pb2.PutResponse.STATUS_COMMITTED,
        kv_pb2.PutResponse.STATUS_EXISTS,
    ]
    read = channel.unary_stream(SERVICE + "Get")(
        kv_pb2.GetRequest(ids=[ITEM.id]).SerializeToString(), timeout=5
    )
    got = [kv_pb2.GetResponse.FromString(raw) async for raw in read]
    assert got[0].start.head + b"".join(one.data for one in got[1:]) == RAW
    assert server.node.stat().reserved_bytes == 0


@pytest.mark.parametrize(
    ("change", "head", "sentence"),
    [
        ({"digest": bytes(32)}, RAW, "do not match the digest"),
        ({"digest": b"short"}, RAW, "digest has 32 bytes"),
        ({"digest": digest_now(RAW)}, RAW + b"x", "more data than"),
        ({"digest": digest_now(RAW), "kind": 77}, RAW, "neither block nor state"),
        ({"digest": digest_now(RAW), "id": bytes(32)}, RAW, "does not match its reservation"),
        ({}, RAW + b"x", "more data than"),
    ],
)
async def test_a_wrong_object_in_one_message_is_refused_once_and_the_next_one_is_not(
    server: StoreServer, channel: Any, change: dict[str, Any], head: bytes, sentence: str
) -> None:
    wrong = encode_first(begin_fields(**change), [head])
    right = encode_first(begin_fields(digest=digest_now(RAW)), [RAW])
    answers = await put_raw(channel, [wrong, right])
    assert [one.status for one in answers] == [
        kv_pb2.PutResponse.STATUS_REFUSED,
        kv_pb2.PutResponse.STATUS_COMMITTED,
    ]
    assert sentence in answers[0].error_message
    assert server.node.stat().reserved_bytes == 0


async def test_a_begin_with_a_head_and_no_digest_still_needs_its_commit(channel: Any) -> None:
    plain = encode_first(begin_fields(), [RAW])
    with pytest.raises(grpc.aio.AioRpcError, match="ended inside an object"):
        await put_raw(channel, [plain])
    answers = await put_raw(channel, [plain, commit()])
    assert [one.status for one in answers] == [1, 3]


async def test_data_in_small_pieces_and_an_abort_in_between(channel: Any) -> None:
    abort = kv_pb2.PutRequest(abort=kv_pb2.PutAbort()).SerializeToString()
    pieces = [encode_data(RAW[start : start + 7]) for start in range(0, len(RAW), 7)]
    answers = await put_raw(channel, [begin(), pieces[0], abort, begin(), *pieces, commit()])
    assert [one.status for one in answers] == [1, 1, 3]
    again = await put_raw(channel, [begin(), *pieces, commit()])
    assert [one.status for one in again] == [kv_pb2.PutResponse.STATUS_EXISTS]


@pytest.mark.parametrize("method", ["Has", "Lease", "Release", "Get"])
async def test_bytes_that_are_no_message_are_an_invalid_argument(channel: Any, method: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match=f"no {method}Request") as caught:
        if method == "Get":
            await channel.unary_stream(SERVICE + method)(b"\xff\xff", timeout=5).read()
        else:
            await channel.unary_unary(SERVICE + method)(b"\xff\xff", timeout=5)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_bounds_on_a_call(channel: Any, server: StoreServer, client: StoreClient) -> None:
    has = channel.unary_unary(SERVICE + "Has")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await has(kv_pb2.HasRequest(ids=[bytes(32)] * 3000).SerializeToString(), timeout=5)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    many = await start_server(StoreConfig(memory_bytes=1000))
    with pytest.raises(grpc.aio.AioRpcError, match="at most 65536"):
        async with grpc.aio.insecure_channel(many.address) as other:
            request = kv_pb2.HasRequest(ids=[bytes(32)] * 65_537).SerializeToString()
            await other.unary_unary(SERVICE + "Has")(request, timeout=5)
    reader = StoreClient(many.address, fingerprint=FINGERPRINT, layout=LAYOUT)
    assert await reader.has([bytes(32)] * 70_000) == [False] * 70_000
    await reader.close()
    await many.stop(0)


async def test_one_write_and_one_read_too_many_are_refused(
    server: StoreServer, channel: Any, client: StoreClient
) -> None:
    put = channel.stream_stream(SERVICE + "Put")
    calls = [put(timeout=5) for _ in range(3)]
    for number, call in enumerate(calls):
        await call.write(begin(id=bytes([number]) * 32))
        await call.read()
    assert server.node.stat().open_puts == 3
    with pytest.raises(OverloadedError, match="3 objects are being written"):
        await client.put(ITEM, owner="w", lease_ttl_s=1)
    for call in calls:
        call.cancel()
    await until(lambda: server.node.stat().reserved_bytes == 0)
    waiting = [asyncio.create_task(fetch(client, [bytes(32)], wait_s=5)) for _ in range(3)]
    await until(lambda: server.node.stat().open_gets == 3)
    with pytest.raises(OverloadedError, match="3 reads are running"):
        await fetch(client, [bytes(32)])
    for task in waiting:
        task.cancel()
    await until(lambda: server.node.stat().open_gets == 0)


async def test_an_idle_put_gives_its_bytes_back(server: StoreServer, channel: Any) -> None:
    call = channel.stream_stream(SERVICE + "Put")()
    await call.write(begin())
    await call.read()
    assert server.node.stat().reserved_bytes == len(RAW)
    await until(lambda: server.node.stat().reserved_bytes == 0)
    assert await call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert "idle" in await call.details()


async def test_a_cancelled_put_gives_its_bytes_back(server: StoreServer, channel: Any) -> None:
    call = channel.stream_stream(SERVICE + "Put")()
    await call.write(begin())
    await call.write(encode_data(RAW[:100]))
    await call.read()
    call.cancel()
    await until(lambda: server.node.stat().open_puts == 0, within_s=0.25)


async def test_a_reader_that_reads_nothing_lets_go(server: StoreServer, channel: Any) -> None:
    big = 1 << 18
    large = [number.to_bytes(32, "big") for number in range(3)]
    for id_ in large:
        header = kv_pb2.ObjectHeader(
            version=1, kind=kv_pb2.OBJECT_KIND_BLOCK, id=id_, payload_bytes=big - 56
        ).SerializeToString()
        raw = len(header).to_bytes(4, "little") + header + bytes(big - 56)
        pieces = [encode_data(raw[at : at + 60_000]) for at in range(0, len(raw), 60_000)]
        end = commit(digest_now(raw))
        start = begin(id=id_, size_bytes=len(raw))
        answers = await put_raw(channel, [start, *pieces, end])
        assert answers[-1].status == kv_pb2.PutResponse.STATUS_COMMITTED
    request = kv_pb2.GetRequest(ids=large * 20).SerializeToString()
    call = channel.unary_stream(SERVICE + "Get")(request)
    await until(lambda: server.node.stat().open_gets == 1)
    await until(lambda: server.node.stat().open_gets == 0, within_s=5)
    assert server.node._catalog.usage().readers == 0
    call.cancel()


async def test_a_lease_longer_than_the_cap_is_shortened(
    server: StoreServer, client: StoreClient
) -> None:
    await client.put(ITEM, owner="w", lease_ttl_s=3600)
    assert server.node.stat().leases == 1
    await until(lambda: server.node.stat().leases == 0, within_s=1.5)


async def test_bytes_that_rot_in_the_node_are_missing_to_the_reader(
    server: StoreServer, client: StoreClient
) -> None:
    items = blocks_of(chain(3))
    await client.put_many(items, owner="w", lease_ttl_s=5)
    rotten = bytearray(server.node._memory._objects[items[1].id])
    rotten[-1] ^= 1
    server.node._memory._objects[items[1].id] = memoryview(rotten)
    got = await fetch(client, [item.id for item in items])
    assert same(got[0], items[0])
    assert got[1] == Missing(items[1].id)
    assert same(got[2], items[2])
    assert (await client.stat()).integrity_failures == 1


def start_of(**change: Any) -> bytes:
    facts = {"id": ITEM.id, "size_bytes": len(RAW), "digest": digest_now(RAW), "epoch": 1}
    return kv_pb2.GetResponse(start=kv_pb2.GetStart(**facts | change)).SerializeToString()


@pytest.mark.parametrize(
    ("messages", "outcome"),
    [
        ([start_of(), encode_data(RAW)], "the object"),
        ([start_of(digest=bytes(32)), encode_data(RAW)], Missing),
        ([start_of(size_bytes=5), encode_data(RAW[:5])], Missing),
        ([start_of(head=RAW)], "the object"),
        ([start_of(head=RAW[:9]), encode_data(RAW[9:])], "the object"),
        ([start_of(head=RAW, digest=bytes(32))], Missing),
        ([start_of(head=RAW + b"x")], StoreUnavailableError),
        ([start_of(head=RAW), encode_data(b"x"), start_of(head=RAW)], "the object"),
        ([b"\x0a\x05\x3a\x02ab\xff"], StoreUnavailableError),
        ([start_of(size_bytes=1 << 50), encode_data(RAW)], StoreUnavailableError),
        ([start_of(), encode_data(RAW[:-1])], StoreUnavailableError),
        ([start_of(), encode_data(RAW + b"x")], StoreUnavailableError),
        ([start_of(), encode_data(b"")], StoreUnavailableError),
        ([start_of(id=bytes(32)), encode_data(RAW)], StoreUnavailableError),
        ([encode_data(RAW)], StoreUnavailableError),
        ([start_of(), b"\xff\xff"], StoreUnavailableError),
        ([b"\xff\xff"], StoreUnavailableError),
        ([b""], StoreUnavailableError),
        ([], StoreUnavailableError),
    ],
)
async def test_whatever_a_node_sends_the_client_yields_truth_or_an_error(
    messages: list[bytes], outcome: Any
) -> None:
    async def get(request: bytes, context: Any) -> AsyncIterator[bytes]:
        for message in messages:
            yield message

    handlers = {"Get": grpc.unary_stream_rpc_method_handler(get)}
    liar = grpc.aio.server()
    liar.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("penstock.kv.v1.KvStore", handlers),)
    )
    port = liar.add_insecure_port("127.0.0.1:0")
    await liar.start()
    client = StoreClient(f"127.0.0.1:{port}", fingerprint=FINGERPRINT, layout=LAYOUT)
    try:
        if isinstance(outcome, type) and issubclass(outcome, PenstockError):
            with pytest.raises(outcome):
                await fetch(client, [ITEM.id])
            return
        (got,) = await fetch(client, [ITEM.id])
        assert same(got, ITEM) if outcome == "the object" else got == Missing(ITEM.id)
    finally:
        await client.close()
        await liar.stop(0)


@pytest.mark.parametrize(
    "call",
    [
        lambda client: client.has([ITEM.id]),
        lambda client: client.put(ITEM, owner="w", lease_ttl_s=1),
        lambda client: client.put_many(blocks_of(chain(4)), owner="w", lease_ttl_s=1),
        lambda client: fetch(client, [ITEM.id], wait_s=1),
        lambda client: client.lease([ITEM.id], owner="w", ttl_s=1),
        lambda client: client.release("w"),
        lambda client: client.stat(),
    ],
)
async def test_a_node_that_is_not_there_is_unavailable_and_nothing_hangs(
    call: Callable[[StoreClient], Any],
) -> None:
    client = StoreClient("127.0.0.1:1", fingerprint=FINGERPRINT, layout=LAYOUT, call_timeout_s=1.0)
    started = time.monotonic()
    with pytest.raises(StoreUnavailableError):
        await call(client)
    assert time.monotonic() - started < 3
    await client.close()


async def test_a_node_that_goes_silent_is_unavailable_in_time() -> None:
    silent = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
    port = silent.sockets[0].getsockname()[1]
    client = StoreClient(
        f"127.0.0.1:{port}", fingerprint=FINGERPRINT, layout=LAYOUT, call_timeout_s=0.5
    )
    started = time.monotonic()
    for call in (client.has([ITEM.id]), client.put(ITEM, owner="w", lease_ttl_s=1)):
        with pytest.raises(StoreUnavailableError):
            await call
    with pytest.raises(StoreUnavailableError):
        await fetch(client, [ITEM.id])
    assert time.monotonic() - started < 4
    await client.close()
    silent.close()
