"""Every RPC of the node against malformed messages made from the proto descriptors.

Messages are valid ones with fields at their edges, missing, repeated, oversized, or with bytes
flipped, cut and inserted. Nothing may answer with anything but a status of the contract, and
nothing may be left behind: leases end, reservations and readers are gone, memory is bounded.
"""

from __future__ import annotations

import asyncio
import random
import resource
from collections import Counter
from typing import Any

import grpc
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from kvstore.client import StoreClient
from kvstore.config import StoreConfig
from kvstore.contracts import Missing
from kvstore.server import StoreServer, start_server
from protos.penstock.kv.v1 import kv_pb2
from tests.kvstore.objects import FINGERPRINT, LAYOUT, blocks_of, chain, fetch, same

MESSAGES = 20_000
PUT_MESSAGES_PER_STREAM = 4
ITEMS = blocks_of(chain(3))
FILE = kv_pb2.DESCRIPTOR
NUMBERS = [0, 1, 2, 255, 1 << 16, (1 << 31) - 1, (1 << 32) - 1, (1 << 63) - 1, (1 << 64) - 1]
MAX_GROWTH_BYTES = 100 << 20
"""Of the test's process, client and server. The store may hold 4 MiB; buffers of 8 calls follow."""

ALLOWED = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.DATA_LOSS,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.FAILED_PRECONDITION,
    # A Get that the test itself ends.
    grpc.StatusCode.CANCELLED,
}


class Maker:
    """Messages of a descriptor, drawn by one seed."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)

    def raw(self, descriptor: Descriptor) -> bytes:
        raw = bytearray(self._message(descriptor, 0).SerializeToString())
        fate = self.rng.random()
        if fate < 0.5 or not raw:
            return bytes(raw)
        for _ in range(self.rng.randint(1, 4)):
            at = self.rng.randrange(len(raw) + 1)
            match self.rng.randrange(4):
                case 0 if at < len(raw):
                    raw[at] ^= 1 << self.rng.randrange(8)
                case 1:
                    del raw[at:]
                case 2:
                    raw[at:at] = self.rng.randbytes(self.rng.randint(1, 12))
                case _:
                    raw[at:at] = raw[: self.rng.randint(0, len(raw))][:4096]
        return bytes(raw)

    def _message(self, descriptor: Descriptor, depth: int) -> Message:
        message: Message = getattr(kv_pb2, descriptor.name)()
        for field in descriptor.fields:
            if self.rng.random() < 0.25:
                continue
            if field.message_type is not None and field.message_type.GetOptions().map_entry:
                for _ in range(self.rng.randint(0, 3)):
                    getattr(message, field.name)[self._text()] = self.rng.choice([0.0, -1.5, 1e300])
            elif field.is_repeated:
                target = getattr(message, field.name)
                for _ in range(self.rng.choice([0, 1, 2, 40])):
                    if field.message_type is None:
                        target.append(self._scalar(field))
                    elif depth < 3:
                        target.append(self._message(field.message_type, depth + 1))
            elif field.message_type is not None:
                inner = self._message(field.message_type, depth + 1)
                getattr(message, field.name).CopyFrom(inner)
            else:
                setattr(message, field.name, self._scalar(field))
        return message

    def _scalar(self, field: FieldDescriptor) -> Any:
        match field.cpp_type:
            case FieldDescriptor.CPPTYPE_STRING if field.type == FieldDescriptor.TYPE_BYTES:
                return self._bytes()
            case FieldDescriptor.CPPTYPE_STRING:
                return self._text()
            case FieldDescriptor.CPPTYPE_BOOL:
                return self.rng.random() < 0.5
            case FieldDescriptor.CPPTYPE_DOUBLE:
                return self.rng.choice([0.0, -1.0, 1e300, float("nan"), float("inf")])
            case FieldDescriptor.CPPTYPE_ENUM:
                return self.rng.choice([0, 1, 2, 3, 99])
            case FieldDescriptor.CPPTYPE_UINT32:
                return self.rng.choice(NUMBERS[:7])
            case FieldDescriptor.CPPTYPE_UINT64:
                # Small ones more often: a reservation that is refused proves little.
                return self.rng.choice([*NUMBERS, 100, 500, 3000])
        raise AssertionError(f"no values for {field.full_name}")

    def _bytes(self) -> bytes:
        known = self.rng.choice(ITEMS).id
        size = self.rng.choice([0, 1, 31, 33, 3000])
        return self.rng.choice([known, known, self.rng.randbytes(32), self.rng.randbytes(size)])

    def _text(self) -> str:
        return self.rng.choice(["", "a", "owner", "\0", "\u00fc" * 100, "x" * 257, "127.0.0.1:1"])


async def _unary(channel: Any, path: str, raw: bytes) -> grpc.StatusCode:
    try:
        await channel.unary_unary(path)(raw, timeout=10)
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


async def _get(channel: Any, path: str, raw: bytes) -> grpc.StatusCode:
    # A wait that a flipped bit made long is ended by the caller's deadline.
    call = channel.unary_stream(path)(raw, timeout=0.2)
    try:
        async for _ in call:
            continue
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


async def _first_of(channel: Any, path: str, raw: bytes) -> grpc.StatusCode:
    """Of a stream that has no end."""
    call = channel.unary_stream(path)(raw, timeout=10)
    try:
        await call.read()
    except grpc.aio.AioRpcError as error:
        return error.code()
    finally:
        call.cancel()
    return grpc.StatusCode.OK


async def _put(channel: Any, path: str, raws: list[bytes]) -> grpc.StatusCode:
    call = channel.stream_stream(path)(iter(raws), timeout=10)
    try:
        async for _ in call:
            continue
    except grpc.aio.AioRpcError as error:
        # What grpc.aio's client says of its own write to a stream that the server has ended.
        if error.details() == "Internal error from Core":
            return grpc.StatusCode.CANCELLED
        return error.code()
    return grpc.StatusCode.OK


def _leftovers(server: StoreServer) -> tuple[int, ...]:
    stat = server.node.stat()
    readers = server.node._catalog.usage().readers
    return (stat.reserved_bytes, stat.open_puts, stat.open_gets, readers, stat.leases)


async def test_twenty_thousand_malformed_messages() -> None:
    config = StoreConfig(
        memory_bytes=4 << 20, max_lease_ttl_s=0.5, max_wait_s=0.05, put_idle_s=2, max_workers=64
    )
    server = await start_server(config)
    client = StoreClient(server.address, fingerprint=FINGERPRINT, layout=LAYOUT)
    await client.put_many(ITEMS, owner="w", lease_ttl_s=0.4)
    sent: Counter[str] = Counter()
    codes: Counter[grpc.StatusCode] = Counter()
    methods = [method for name in FILE.services_by_name for method in _methods(name)]

    async def worker(number: int, channel: Any) -> None:
        maker = Maker(number)
        while sum(sent.values()) < MESSAGES:
            method = maker.rng.choice(methods)
            path = f"/{method.containing_service.full_name}/{method.name}"
            count = PUT_MESSAGES_PER_STREAM if method.client_streaming else 1
            raws = [maker.raw(method.input_type) for _ in range(count)]
            sent[path] += count
            if method.client_streaming:
                code = await _put(channel, path, raws)
            elif method.name == "Subscribe":
                code = await _first_of(channel, path, raws[0])
            elif method.server_streaming:
                code = await _get(channel, path, raws[0])
            else:
                code = await _unary(channel, path, raws[0])
            assert code in ALLOWED, f"{path} ended with {code}"
            codes[code] += 1

    before = _most_memory()
    async with grpc.aio.insecure_channel(server.address) as channel, asyncio.TaskGroup() as group:
        for number in range(8):
            group.create_task(worker(number, channel))
    grown = _most_memory() - before
    print(f"{grown / 2**20:.1f} MiB more at the most")
    assert grown < MAX_GROWTH_BYTES
    print(dict(sent), {code.name: count for code, count in codes.items()})
    assert len(sent) == len(methods) and min(sent.values()) > 100

    # No crash: the same node serves what it was given, and takes more.
    found = await fetch(client, [item.id for item in ITEMS])
    assert all(
        same(got, item) or isinstance(got, Missing) for got, item in zip(found, ITEMS, strict=True)
    )
    await client.put_many(ITEMS, owner="w", lease_ttl_s=0.4)
    found = await fetch(client, [item.id for item in ITEMS], ttl_s=0.4)
    assert all(same(got, item) for got, item in zip(found, ITEMS, strict=True))
    # No leak: what the messages held ends with its TTL or its stream.
    deadline = asyncio.get_running_loop().time() + 5
    while _leftovers(server) != (0, 0, 0, 0, 0):
        assert asyncio.get_running_loop().time() < deadline, _leftovers(server)
        await asyncio.sleep(0.05)
    assert server.node.stat().used_bytes <= config.memory_bytes
    await client.close()
    await server.stop(0.1)


def _most_memory() -> int:
    """Bytes resident at the most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _methods(service: str) -> list[Any]:
    return list(FILE.services_by_name[service].methods)
