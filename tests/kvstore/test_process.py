"""The node as a process: starting, stopping, and every neighbour killed under it."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvstore.client import StoreClient
from kvstore.config import StoreConfig
from kvstore.contracts import StoreObject
from kvstore.server import start_server
from penstock.errors import StoreUnavailableError
from tests.kvstore.objects import FINGERPRINT, LAYOUT, block, blocks_of, chain, fetch
from tests.kvstore.redis_server import RedisServer, free_port, running_redis
from tests.kvstore.test_store_contract import until

# Starts a node as its child, says where it is, and waits to be killed.
PARENT = """
import subprocess, sys, time
child = subprocess.Popen(
    [sys.executable, "-m", "kvstore", "--listen", "127.0.0.1:0", "--exit-with-parent"],
    stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
)
print(child.pid, child.stdout.readline().strip(), flush=True)
time.sleep(60)
"""

# Begins an object, sends half of it, says so, and waits to be killed.
WRITER = """
import sys, time, grpc
from kvstore.wire import encode_data
from protos.penstock.kv.v1 import kv_pb2
begin = kv_pb2.PutBegin(id=bytes(32), kind=1, size_bytes=100000, owner="w", lease_ttl_ms=1000)
def messages():
    yield kv_pb2.PutRequest(begin=begin).SerializeToString()
    yield encode_data(bytes(50000))
    time.sleep(60)
channel = grpc.insecure_channel(sys.argv[1])
for answer in channel.stream_stream("/penstock.kv.v1.KvStore/Put")(messages()):
    print("reserved", flush=True)
"""


@contextmanager
def node(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A node process and its address; killed at the end if it still runs."""
    process = spawn("-m", "kvstore", *arguments)
    assert process.stdout is not None
    try:
        word, address = process.stdout.readline().split()
        assert word == "ready"
        yield process, address
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture
def own_redis() -> Iterator[RedisServer]:
    with running_redis() as server:
        yield server


def client_of(address: str, index: str | None = None) -> StoreClient:
    return StoreClient(address, fingerprint=FINGERPRINT, layout=LAYOUT, index=index)


def alive(pid: int) -> bool:
    """False also for a zombie that nobody has collected yet."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def spawn(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, text=True)


async def test_a_node_serves_tells_its_health_and_stops_on_sigterm() -> None:
    with node("--listen", "127.0.0.1:0", "--memory", "1000000") as (process, address):
        client = client_of(address)
        assert await client.put(block(chain(1), 0), owner="w", lease_ttl_s=5)
        async with grpc.aio.insecure_channel(address) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            for service in ("", "penstock.kv.v1.KvStore", "penstock.kv.v1.Directory"):
                answer = await stub.Check(health_pb2.HealthCheckRequest(service=service))
                assert answer.status == health_pb2.HealthCheckResponse.SERVING
        waiting = asyncio.create_task(fetch(client, [bytes(32)], wait_s=60))
        await asyncio.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(process.wait, 5) == 0
        with pytest.raises(StoreUnavailableError):
            await waiting
        await client.close()


async def test_kill_9_of_the_parent_ends_the_node() -> None:
    parent = spawn("-c", PARENT)
    assert parent.stdout is not None
    pid, ready, address = parent.stdout.readline().split()
    assert ready == "ready"
    client = client_of(address)
    await client.stat()
    parent.kill()
    parent.wait()
    parent.stdout.close()
    await until(lambda: not alive(int(pid)), within_s=5)
    await client.close()


async def test_kill_9_of_a_writer_returns_its_bytes_at_once() -> None:
    with node("--listen", "127.0.0.1:0") as (_, address):
        client = client_of(address)
        writer = spawn("-c", WRITER, address)
        assert writer.stdout is not None
        assert writer.stdout.readline() == "reserved\n"
        assert (await client.stat()).reserved_bytes == 100_000
        writer.kill()
        killed = time.monotonic()
        while (await client.stat()).reserved_bytes:
            assert time.monotonic() - killed < 2
            await asyncio.sleep(0.005)
        print(f"reserved bytes back after {(time.monotonic() - killed) * 1e3:.0f} ms")
        assert (await client.stat()).open_puts == 0
        writer.wait()
        writer.stdout.close()
        await client.close()


async def test_a_client_survives_kill_9_and_restart_of_the_node() -> None:
    listen = f"127.0.0.1:{free_port()}"
    item = block(chain(1), 0)
    with node("--listen", listen) as (_, address):
        client = client_of(address)
        await client.put(item, owner="w", lease_ttl_s=60)
        epoch = (await client.stat()).epoch
    with pytest.raises(StoreUnavailableError):
        await client.has([item.id])
    with node("--listen", listen):
        async with asyncio.timeout(5):
            while True:
                try:
                    assert await client.has([item.id]) == [False]
                    break
                except StoreUnavailableError:
                    await asyncio.sleep(0.05)
        assert await client.put(item, owner="w", lease_ttl_s=60)
        assert (await client.stat()).epoch > epoch
    await client.close()


def refused(*arguments: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "kvstore", *arguments]
    run = subprocess.run(command, capture_output=True, text=True, timeout=20)
    return run.returncode, run.stderr.strip()


def test_what_cannot_start_says_why_in_one_sentence() -> None:
    code, text = refused("--redis-url", f"redis://user:s3cret@127.0.0.1:{free_port()}/0")
    assert (code, text.count("\n")) == (1, 0)
    assert "Redis at 127.0.0.1" in text
    assert "s3cret" not in text
    code, text = refused("--listen", "nowhere")
    assert (code, text) == (
        2,
        "kvstore: the store cannot listen on 'nowhere': it must be HOST:PORT",
    )
    code, text = refused("--memory", "0")
    assert (code, text.count("\n")) == (2, 0)
    assert "memory_bytes" in text


async def test_flush_and_kill_9_of_redis_under_use_cost_no_call(own_redis: RedisServer) -> None:
    config = StoreConfig(memory_bytes=1 << 22, redis_url=own_redis.url, heartbeat_s=0.1)
    server = await start_server(config)
    client = client_of(server.address, own_redis.url)
    stop = asyncio.Event()
    rounds = 0

    async def use(number: int) -> None:
        nonlocal rounds
        while not stop.is_set():
            items = blocks_of(chain(3, seed=rounds * 10 + number))
            ids = [item.id for item in items]
            assert await client.put_many(items, owner=f"w{number}", lease_ttl_s=5) == [True] * 3
            assert await client.has(ids) == [True] * 3
            got = await fetch(client, ids, owner=f"w{number}")
            assert all(isinstance(item, StoreObject) for item in got)
            await client.release(f"w{number}")
            rounds += 1

    users = [asyncio.create_task(use(number)) for number in range(3)]
    for _ in range(3):
        await asyncio.sleep(0.2)
        own_redis.command(b"FLUSHALL")
    own_redis.kill()
    await asyncio.sleep(0.7)
    during = rounds
    assert not (await client.stat()).index_healthy
    own_redis.start()
    await asyncio.sleep(1.5)
    stop.set()
    await asyncio.gather(*users)
    assert rounds > during > 10
    assert (await client.stat()).index_healthy
    await client.close()
    await server.stop(0)


async def test_after_a_flush_the_node_announces_everything_again(own_redis: RedisServer) -> None:
    config = StoreConfig(
        memory_bytes=1 << 22, redis_url=own_redis.url, heartbeat_s=0.1, announce_batch=10
    )
    server = await start_server(config)
    client = client_of(server.address)
    items = blocks_of(chain(40))
    await client.put_many(items, owner="w", lease_ttl_s=60)

    async def announced(count: int) -> None:
        # Beside the objects: one key of the node, one set of all nodes.
        size = b":%d\r\n" % (count + 2)
        await until(lambda: own_redis.command(b"DBSIZE") == size, within_s=5)

    await announced(40)
    own_redis.command(b"FLUSHALL")
    await announced(40)
    own_redis.kill()
    await client.put(block(chain(1, seed=1), 0), owner="w", lease_ttl_s=60)
    own_redis.start()
    await announced(41)
    await client.close()
    await server.stop(0)
