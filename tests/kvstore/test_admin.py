"""`penstock kv stat|ls|verify|evict` against a running node with both tiers."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from cluster.cli import main
from kvstore.admin import PAGE_OBJECTS, SERVICE, VERIFY_IDS
from kvstore.client import StoreClient
from kvstore.config import StoreConfig
from kvstore.server import StoreServer, start_server
from protos.penstock.kv.v1 import kv_pb2
from tests.kvstore.objects import FINGERPRINT, LAYOUT, blocks_of, chain

ITEMS = blocks_of(chain(8))
IDS = sorted(item.id.hex() for item in ITEMS)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[StoreServer]:
    """A node in a thread, with all items in memory and on disk and a lease on the first."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def call(work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, loop).result(20)

    async def start() -> StoreServer:
        config = StoreConfig(
            memory_bytes=1 << 20,
            disk_bytes=1 << 20,
            disk_extent_bytes=1 << 16,
            disk_dir=str(tmp_path / "kv"),
        )
        server = await start_server(config)
        client = StoreClient(server.address, fingerprint=FINGERPRINT, layout=LAYOUT)
        await client.put_many(ITEMS, owner="w", lease_ttl_s=60)
        await client.release("w")
        await client.lease([ITEMS[0].id], owner="r", ttl_s=60)
        while server.node.stat().disk_objects < 8:  # noqa: ASYNC110 - a disk in another thread
            await asyncio.sleep(0.01)
        await client.close()
        return server

    server = call(start())
    yield server
    call(server.stop(0.1))
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def run(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    assert main(["kv", *arguments]) == code
    return capsys.readouterr().out


def test_what_a_node_holds_is_listed_verified_and_let_go(
    node: StoreServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    at = ["--server", node.address]
    figures = json.loads(run(capsys, "stat", *at, "--json"))
    assert (figures["objects"], figures["disk_objects"]) == (8, 8)
    rows = json.loads(run(capsys, "ls", *at, "--json"))
    assert [row["id"] for row in rows] == IDS
    assert all(row["in_memory"] and row["on_disk"] for row in rows)
    held = {row["id"] for row in rows if row["held"]}
    assert held <= {ITEMS[0].id.hex()} and held
    assert run(capsys, "ls", *at, "--limit", "3").count("\n") == 3

    assert "16 copies of 8 objects" in run(capsys, "verify", *at)
    (extent,) = (tmp_path / "kv").glob("extent-*.kv")
    raw = bytearray(extent.read_bytes())
    raw[-1] ^= 1
    extent.write_bytes(raw)
    found = json.loads(run(capsys, "verify", *at, "--json", code=1))
    assert len(found["damaged"]) == 1
    assert json.loads(run(capsys, "stat", *at, "--json"))["disk_quarantined"] == 1

    gone = json.loads(run(capsys, "evict", *at, *IDS, "--tier", "memory", "--json"))
    assert gone["evicted"] == 7, "the leased one stays"
    gone = json.loads(run(capsys, "evict", *at, "--bytes", "1", "--tier", "all", "--json"))
    assert gone["evicted"] == 1, "memory has nothing idle left"
    figures = json.loads(run(capsys, "stat", *at, "--json"))
    assert (figures["objects"], figures["disk_objects"]) == (1, 6)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["evict"], "say what to evict"),
        (["evict", "xyz"], "no object id"),
        (["evict", "--bytes", "1", "--tier", "tape"], "there are memory, disk and all"),
        (["stat"], "cannot be reached"),
    ],
)
def test_refusals_say_what_to_do(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["kv", *arguments, "--server", "127.0.0.1:1"]) != 0
    assert sentence in capsys.readouterr().err


def test_a_call_verifies_and_lists_no_more_than_allowed(node: StoreServer) -> None:
    async def ask() -> None:
        async with grpc.aio.insecure_channel(node.address) as channel:
            many = kv_pb2.VerifyRequest(ids=[bytes(32)] * (VERIFY_IDS + 1)).SerializeToString()
            with pytest.raises(grpc.aio.AioRpcError, match="at most 256") as caught:
                await channel.unary_unary(f"/{SERVICE}/Verify")(many, timeout=5)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            page = kv_pb2.ListObjectsRequest(limit=2**32 - 1).SerializeToString()
            raw = await channel.unary_unary(f"/{SERVICE}/ListObjects")(page, timeout=5)
            answer = kv_pb2.ListObjectsResponse.FromString(raw)
            assert len(answer.objects) == 8 <= PAGE_OBJECTS

    asyncio.run(ask())
