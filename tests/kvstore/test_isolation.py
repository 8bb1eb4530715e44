"""Two tenants with the same document in one node: each RPC of the store, tried by the second."""

from __future__ import annotations

from typing import Any

import grpc
import pytest
from google.protobuf.message import Message

from kvstore.client import StoreClient
from kvstore.config import StoreConfig
from kvstore.contracts import Missing
from kvstore.mirror import NAME_BYTES
from kvstore.server import start_server
from penstock.identity import Chain, namespace
from protos.penstock.kv.v1 import kv_pb2
from tests.kvstore.objects import FINGERPRINT, LAYOUT, blocks_of, chain, fetch, state

TOKENS = chain(4).tokens
FIRST, SECOND = (
    Chain.start(FINGERPRINT, namespace(b"secret of the cluster", tenant)).extend(TOKENS)
    for tenant in ("first", "second")
)
ITEMS = [*blocks_of(FIRST), state(FIRST, 1024)]
SERVICE = kv_pb2.DESCRIPTOR.services_by_name["KvStore"]


def request_of(name: str) -> Message:
    """What the second tenant's worker can say: its own ids, whatever the first one's were."""
    request: Any = getattr(kv_pb2, SERVICE.methods_by_name[name].input_type.name)()
    fields = request.DESCRIPTOR.fields_by_name
    if "ids" in fields:
        request.ids.extend([*SECOND.blocks, SECOND.state_id(1024)])
    if "owner" in fields:
        request.owner = "second"
    if name == "Put":
        request.begin.CopyFrom(
            kv_pb2.PutBegin(id=SECOND.blocks[0], kind=1, size_bytes=100, owner="second")
        )
    return request  # type: ignore[no-any-return]


async def answers(channel: Any, name: str) -> bytes:
    """All that one call of `name` says, up to its fourth message or its refusal."""
    path, method = f"/{SERVICE.full_name}/{name}", SERVICE.methods_by_name[name]
    raw = request_of(name).SerializeToString()
    said = b""
    try:
        if method.client_streaming:
            call = channel.stream_stream(path)(iter([raw]), timeout=3)
        elif method.server_streaming:
            call = channel.unary_stream(path)(raw, timeout=3)
        else:
            return bytes(await channel.unary_unary(path)(raw, timeout=3))
        for _ in range(4):
            message = await call.read()
            if message is grpc.aio.EOF:
                break
            said += message
        call.cancel()
    except grpc.aio.AioRpcError as error:
        said += (error.details() or "").encode()
    return said


async def test_no_call_tells_the_second_tenant_of_the_first_ones_document() -> None:
    server = await start_server(StoreConfig(memory_bytes=8 << 20, heartbeat_s=0.1))
    client = StoreClient(server.address, fingerprint=FINGERPRINT, layout=LAYOUT)
    await client.put_many(ITEMS, owner="first", lease_ttl_s=30)
    secrets = [item.id for item in ITEMS]
    assert not set(secrets) & {*SECOND.blocks, SECOND.state_id(1024)}, "nothing is shared"
    async with grpc.aio.insecure_channel(server.address) as channel:
        for name in SERVICE.methods_by_name:
            said = await answers(channel, name)
            for id_ in secrets:
                assert id_ not in said, f"{name} tells an id"
                assert id_.hex().encode() not in said, f"{name} tells an id"
            if name == "Subscribe":
                assert any(id_[:NAME_BYTES] in said for id_ in secrets), "the test did look"
    assert await client.has(SECOND.blocks) == [False] * 4
    assert await client.lease(SECOND.blocks, owner="second", ttl_s=5) == [False] * 4
    assert all(isinstance(got, Missing) for got in await fetch(client, SECOND.blocks))
    # And what the first one has is untouched by all that the second one tried.
    assert await client.has(secrets) == [True] * 5
    assert server.node.stat().leases == 5
    await client.close()
    await server.stop(0.1)


@pytest.mark.parametrize("name", list(SERVICE.methods_by_name))
def test_every_rpc_is_tried_with_something_to_say(name: str) -> None:
    request = request_of(name)
    assert not {"ids", "owner"} & set(request.DESCRIPTOR.fields_by_name) or request.ByteSize()
