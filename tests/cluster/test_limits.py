"""docs/limits.md is what the code does, and every row of it has a test that goes beyond."""

from __future__ import annotations

import ast
import asyncio
import struct
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from cluster.api import create_app
from cluster.api.fake_service import FakeService
from cluster.api.schema import LONGEST_SALT, MOST_CHOICES
from cluster.api.scope import LONGEST_ID
from cluster.auth.authenticators import LONGEST_KEY, open_authenticator
from cluster.config import ClusterConfig, FrontSection
from cluster.limits import LIMITS, page
from kvstore.client import StoreClient
from kvstore.config import StoreConfig
from kvstore.contracts import Missing
from kvstore.node import MAX_OWNER_CHARS
from kvstore.server import start_server
from model.shards import LARGEST_HEADER
from model.shards import read_header as read_shard
from penstock.chat import PlainChat
from penstock.chat.messages import MOST_CALLS, MOST_MESSAGES, read_messages
from penstock.chat.prompts import LARGEST_BYTES, read_prompts
from penstock.errors import (
    AuthenticationError,
    InvalidRequestError,
    ModelLoadError,
    OverloadedError,
)
from penstock.folder import LARGEST_JSON_BYTES, read_json
from penstock.request import LONGEST_STOP, MOST_STOPS
from penstock.rpc import MAX_MESSAGE_BYTES
from penstock.telemetry import Telemetry
from penstock.tokenizer import ByteTokenizer
from protos.penstock.kv.v1 import kv_pb2
from tests.decode.pair import pair
from tests.kvstore.objects import FINGERPRINT, LAYOUT, block, chain, fetch

ROOT = Path(__file__).parents[2]
STORE = "/penstock.kv.v1.KvStore/"


def test_the_page_is_what_the_code_does() -> None:
    """To write it anew: `.venv/bin/python -m cluster.limits > docs/limits.md`."""
    assert (ROOT / "docs" / "limits.md").read_text() == page()


@pytest.mark.parametrize("limit", LIMITS, ids=[limit.where for limit in LIMITS])
def test_every_limit_names_something_that_exists_and_a_test_of_it(limit: Any) -> None:
    value = limit.value
    # A disk tier of 0 bytes is none at all.
    assert value is None or value > 0 or limit.where == "kvstore.disk_bytes"
    file, _, name = limit.tests.partition("::")
    tree = ast.parse((ROOT / file).read_text())
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    assert name in {node.name for node in tree.body if isinstance(node, kinds)}


def test_every_setting_that_bounds_is_on_the_page() -> None:
    """A new `max_...` or `..._timeout_s` must say what happens beyond it."""
    elsewhere = {
        # The launcher waits for its own processes; nobody outside can reach these.
        "launcher.start_timeout_s", "launcher.drain_timeout_s", "parallel.timeout_s",
        # How much at once, not how much at most.
        "prefill.max_running", "decode.max_running",
        # What the store remembers of itself.
        "kvstore.max_objects", "kvstore.max_worker_ttl_s", "kvstore.max_pending_announcements",
    }  # fmt: skip
    listed = {limit.where for limit in LIMITS}
    found = set()
    for section, field in ClusterConfig.model_fields.items():
        kind: Any = field.annotation
        for name in kind.model_fields:
            if name.startswith("max_") or name.endswith("timeout_s"):
                found.add(f"{section}.{name}")
    ours = {"front", "model", "prefill", "decode", "kvstore", "parallel", "launcher"}
    missing = {name for name in found - listed - elsewhere if name.split(".")[0] in ours}
    assert not missing, f"add them to cluster/limits.py: {missing}"


def _chat(**fields: Any) -> dict[str, Any]:
    return {"model": "fake", "messages": [{"role": "user", "content": "hi"}]} | fields


def _messages(count: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": "x"}] * count


def _calls(count: int) -> list[dict[str, Any]]:
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    return [
        {"role": "user", "content": "x"},
        {"role": "assistant", "tool_calls": [call] * count},
        {"role": "tool", "content": "y", "tool_call_id": "a"},
    ]


@pytest.mark.parametrize(
    ("name", "within", "beyond", "code"),
    [
        ("n", {"n": 2}, {"n": MOST_CHOICES + 1}, "invalid_value"),
        ("messages", {"messages": _messages(9)}, {"messages": _messages(MOST_MESSAGES + 1)}, ""),
        ("stop", {"stop": ["a"] * MOST_STOPS}, {"stop": ["a"] * (MOST_STOPS + 1)}, ""),
        ("stop", {"stop": "a" * LONGEST_STOP}, {"stop": "a" * (LONGEST_STOP + 1)}, ""),
        (
            "cache_salt",
            {"cache_salt": "s" * LONGEST_SALT},
            {"cache_salt": "s" * (LONGEST_SALT + 1)},
            "",
        ),
        ("X-Request-Id", {"id": "r" * LONGEST_ID}, {"id": "r" * (LONGEST_ID + 1)}, ""),
    ],
)
async def test_one_more_than_allowed_is_refused_by_name(
    name: str, within: dict[str, Any], beyond: dict[str, Any], code: str
) -> None:
    tokenizer = ByteTokenizer()
    app = create_app(
        FakeService(max_model_len=100_000),
        tokenizer=tokenizer,
        chat=PlainChat(tokenizer),
        config=FrontSection(),
        telemetry=Telemetry(),
    )
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://api") as client:

        async def status(fields: dict[str, Any]) -> httpx.Response:
            headers = {"x-request-id": fields["id"]} if "id" in fields else {}
            body = _chat(max_tokens=1, **{k: v for k, v in fields.items() if k != "id"})
            return await client.post("/v1/chat/completions", json=body, headers=headers)

        assert (await status(within)).status_code == 200
        refused = await status(beyond)
    error = refused.json()["error"]
    print(error)
    assert refused.status_code == 400
    assert name in f"{error['param']} {error['message']}" and code in ("", error["code"])


def test_a_message_with_too_many_tool_calls_is_refused() -> None:
    roles = ("user", "assistant", "tool")
    assert len(read_messages(_calls(MOST_CALLS), roles)) == 3
    with pytest.raises(InvalidRequestError, match=f"at most {MOST_CALLS} are taken"):
        read_messages(_calls(MOST_CALLS + 1), roles)


def test_a_key_longer_than_any_is_refused_unread() -> None:
    key = "k" * (LONGEST_KEY + 1)
    keys = open_authenticator(api_keys=(key,), keys_file=None)
    with pytest.raises(AuthenticationError):
        keys.authenticate(f"Bearer {key}")
    keys.close()


async def test_a_message_to_a_worker_over_its_limit_is_refused() -> None:
    async with pair() as workers:
        address = workers.decode.address
        big = b"\x0a" + b"\xff" * (MAX_MESSAGE_BYTES + 1)
        options = [("grpc.max_send_message_length", -1)]
        async with grpc.aio.insecure_channel(address, options=options) as channel:
            call = channel.unary_stream("/penstock.worker.v1.Decode/Generate")(big, timeout=20)
            assert await call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_the_store_holds_no_more_leases_than_allowed() -> None:
    server = await start_server(StoreConfig(memory_bytes=1 << 20, max_leases=2))
    client = StoreClient(server.address, fingerprint=FINGERPRINT, layout=LAYOUT)
    item = block(chain(1), 0)
    try:
        for owner in ("a", "b"):
            await client.put(item, owner=owner, lease_ttl_s=60)
        with pytest.raises(OverloadedError, match="its 2 leases"):
            await client.lease([item.id], owner="c", ttl_s=60)
        await client.release("a")
        assert await client.lease([item.id], owner="c", ttl_s=60) == [True]
    finally:
        await client.close()
        await server.stop(0)


async def test_a_wait_beyond_the_longest_ends_as_missing() -> None:
    server = await start_server(StoreConfig(memory_bytes=1 << 20, max_wait_s=0.3))
    client = StoreClient(server.address, fingerprint=FINGERPRINT, layout=LAYOUT)
    try:
        started = asyncio.get_running_loop().time()
        got = await fetch(client, [bytes(32)], wait_s=100)
        took = asyncio.get_running_loop().time() - started
        print(f"missing after {took:.2f} s")
        assert got == [Missing(bytes(32))] and 0.2 < took < 5
    finally:
        await client.close()
        await server.stop(0)


async def test_an_owner_with_too_long_a_name_is_refused() -> None:
    server = await start_server(StoreConfig(memory_bytes=1 << 20))
    try:
        async with grpc.aio.insecure_channel(server.address) as channel:
            lease = channel.unary_unary(STORE + "Lease")
            for size, expected in (
                (MAX_OWNER_CHARS, grpc.StatusCode.OK),
                (MAX_OWNER_CHARS + 1, grpc.StatusCode.INVALID_ARGUMENT),
            ):
                request = kv_pb2.LeaseRequest(owner="o" * size, ids=[bytes(32)], ttl_ms=1000)
                call = lease(request.SerializeToString(), timeout=5)
                assert await call.code() is expected
    finally:
        await server.stop(0)


async def test_the_store_answers_no_more_calls_at_once_than_allowed() -> None:
    server = await start_server(StoreConfig(memory_bytes=1 << 20, max_concurrent_calls=3))
    try:
        async with grpc.aio.insecure_channel(server.address) as channel:
            get = channel.unary_stream(STORE + "Get")
            request = kv_pb2.GetRequest(ids=[bytes(32)], wait_ms=60_000).SerializeToString()
            waiting = [get(request, timeout=30) for _ in range(3)]
            deadline = asyncio.get_running_loop().time() + 5
            while server.node.stat().open_gets < 3:
                assert asyncio.get_running_loop().time() < deadline
                await asyncio.sleep(0.01)
            stat = channel.unary_unary(STORE + "Stat")
            assert await stat(b"", timeout=5).code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            for call in waiting:
                call.cancel()
    finally:
        await server.stop(0)


def _sparse(path: Path, size_bytes: int, start: bytes = b"") -> None:
    with path.open("wb") as file:
        file.write(start)
        file.truncate(size_bytes)


def test_files_of_a_model_folder_that_are_too_large_are_not_read(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    _sparse(config, LARGEST_JSON_BYTES + 1)
    with pytest.raises(ModelLoadError, match=r"config\.json is larger"):
        read_json(config)
    (tmp_path / "encoding").mkdir()
    text = tmp_path / "encoding" / "texts.py"
    _sparse(text, LARGEST_BYTES + 1)
    config.write_text("{}")
    with pytest.raises(ModelLoadError, match=r"texts\.py"):
        read_prompts(tmp_path)
    shard = tmp_path / "model.safetensors"
    _sparse(shard, LARGEST_HEADER + 100, struct.pack("<Q", LARGEST_HEADER + 1))
    with pytest.raises((ModelLoadError, ValueError), match="header"):
        read_shard(shard)
