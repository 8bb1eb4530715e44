"""Real processes and real SIGKILL: store node, Redis, writer and reader, at drawn moments.

The node process serves an in-memory tier smaller than the objects and a disk tier. After each kill:
it serves within 5 s, what was on disk is there, nothing stays reserved, the index knows it again.
"""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvstore.client import StoreClient
from kvstore.config import StoreSpec
from kvstore.contracts import Missing
from kvstore.index.redis import RedisIndex
from penstock.errors import OverloadedError, StoreUnavailableError
from tests.kvstore.objects import FINGERPRINT, LAYOUT, blocks_of, chain, fetch, same
from tests.kvstore.redis_server import RedisServer, free_port, running_redis

ITEMS = blocks_of(chain(24))
IDS = [item.id for item in ITEMS]
OBJECT_BYTES = LAYOUT.block_bytes + 600

# Puts or gets all objects again and again until it is killed.
WORKER = """
import asyncio, sys
from kvstore.client import StoreClient
from kvstore.contracts import Missing
from penstock.errors import PenstockError
from tests.chaos.test_processes import FINGERPRINT, IDS, ITEMS, LAYOUT, fetch, same

async def main():
    role, address = sys.argv[1:]
    client = StoreClient(address, fingerprint=FINGERPRINT, layout=LAYOUT, call_timeout_s=2)
    print("up", flush=True)
    while True:
        try:
            if role == "writer":
                await client.put_many(ITEMS, owner="w", lease_ttl_s=1)
                await client.release("w")
            else:
                found = await fetch(client, IDS, owner="r", ttl_s=1)
                for got, item in zip(found, ITEMS):
                    assert isinstance(got, Missing) or same(got, item), "a wrong object"
                await client.release("r")
        except PenstockError:
            await asyncio.sleep(0.01)

asyncio.run(main())
"""


class Processes:
    """One node, one Redis, a writer and a reader, each of which may be killed and started again."""

    def __init__(self, folder: Path, redis: RedisServer) -> None:
        self.redis = redis
        self.spec = StoreSpec(
            listen=f"127.0.0.1:{free_port()}",
            node_id="chaos",
            memory_bytes=10 * OBJECT_BYTES,
            disk_bytes=16 << 16,
            disk_extent_bytes=1 << 16,
            disk_dir=str(folder),
            disk_sync_s=0.05,
            redis_url=redis.url,
            heartbeat_s=0.1,
        )
        self.running: dict[str, subprocess.Popen[str]] = {}
        self.client = StoreClient(self.spec.listen, fingerprint=FINGERPRINT, layout=LAYOUT)

    def start(self, name: str) -> None:
        if name == "node":
            process = self._spawn("-m", "kvstore", "--config-stdin", stdin=subprocess.PIPE)
            assert process.stdin is not None
            process.stdin.write(self.spec.model_dump_json() + "\n")
            process.stdin.flush()
        else:
            process = self._spawn("-c", WORKER, name, self.spec.listen)
        assert process.stdout is not None
        assert process.stdout.readline(), f"the {name} did not start"
        self.running[name] = process

    def kill(self, name: str) -> None:
        process = self.running.pop(name)
        assert process.poll() is None, f"the {name} had ended by itself"
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()

    async def close(self) -> None:
        for name in list(self.running):
            self.running[name].kill()
            self.kill_quietly(name)
        await self.client.close()

    def kill_quietly(self, name: str) -> None:
        process = self.running.pop(name)
        process.kill()
        process.wait()

    async def serves(self, within_s: float) -> None:
        deadline = time.monotonic() + within_s
        while True:
            try:
                await self.client.stat()
                return
            except StoreUnavailableError:
                assert time.monotonic() < deadline, f"it does not serve after {within_s} s"
                await asyncio.sleep(0.02)

    async def check(self) -> None:
        """Everything was put once and is on disk: all of it is there, to the byte."""
        deadline = time.monotonic() + 5
        while (await self.client.stat()).disk_objects < len(ITEMS):
            assert time.monotonic() < deadline, "what was on disk is there again"
            await asyncio.sleep(0.02)
        for start in range(0, len(ITEMS), 4):
            while True:
                try:
                    found = await fetch(self.client, IDS[start : start + 4], owner="check")
                    break
                except (OverloadedError, StoreUnavailableError):
                    assert time.monotonic() < deadline
                    await asyncio.sleep(0.02)
            assert not any(isinstance(got, Missing) for got in found)
            assert all(
                same(got, item) for got, item in zip(found, ITEMS[start : start + 4], strict=True)
            )
        await self.client.release("check")

    async def nothing_reserved(self) -> None:
        deadline = time.monotonic() + 5
        while (await self.client.stat()).reserved_bytes:
            assert time.monotonic() < deadline, "reserved bytes return within 5 s"
            await asyncio.sleep(0.02)

    async def converged(self) -> None:
        index = RedisIndex(self.redis.url, lookup_timeout_s=2.0)
        epoch = (await self.client.stat()).epoch
        deadline = time.monotonic() + 10
        while True:
            known = await index.lookup(IDS)
            if all(place is not None and place.epoch == epoch for place in known):
                break
            assert time.monotonic() < deadline, "the index converges within 10 s"
            await asyncio.sleep(0.05)
        await index.close()

    def _spawn(self, *arguments: str, stdin: int | None = None) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, *arguments],
            stdin=stdin,
            stdout=subprocess.PIPE,
            text=True,
            env=dict(os.environ),
        )


async def test_kill_9_of_each_process_again_and_again(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    asked = request.config.getoption("--chaos-schedules", None)
    kills = 8 if asked is None else max(8, asked // 50)
    rng = random.Random(7)
    slowest_s = 0.0
    with running_redis() as redis:
        one = Processes(tmp_path / "kv", redis)
        try:
            one.start("node")
            await one.client.put_many(ITEMS[:10], owner="first", lease_ttl_s=5)
            for start in range(0, len(ITEMS), 4):
                await one.client.release("first")
                await one.client.put_many(ITEMS[start : start + 4], owner="first", lease_ttl_s=5)
            await one.client.release("first")
            await one.check()
            for name in ("writer", "reader"):
                one.start(name)
            victims = ["node", "writer", "redis", "reader"]
            for turn in range(kills):
                await asyncio.sleep(rng.random() * 0.3)
                victim = victims[turn % 4]
                begun = time.monotonic()
                if victim == "redis":
                    redis.kill()
                    await one.check()
                    redis.start()
                else:
                    one.kill(victim)
                    one.start(victim)
                await one.serves(5)
                slowest_s = max(slowest_s, time.monotonic() - begun if victim == "node" else 0)
                await one.check()
                await one.converged()
            for name in ("writer", "reader"):
                one.kill(name)
            await one.nothing_reserved()
        finally:
            await one.close()
    print(f"{kills} kills; the slowest node served {slowest_s:.2f} s after its kill")
    assert slowest_s < 5
