"""SIGKILL while large objects move: over the data port and in shared memory.

Node, writer and reader are processes of their own and die at drawn moments. Nobody ever reads a
wrong object, what a writer reserved returns within 5 s, and whoever is started again goes on.
"""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
import time

import pytest

from kvstore.client import StoreClient
from kvstore.contracts import Missing, StoreStat
from penstock.blocks import CacheLayout, Component, ComponentKind
from penstock.errors import StoreUnavailableError
from tests.kvstore.objects import FINGERPRINT, block, chain, fetch, same
from tests.kvstore.redis_server import free_port

SCHEDULES = 6
LAYOUT = CacheLayout((Component("rows.0", ComponentKind.COMPRESSED, 4, 24_000),))
"""Blocks of 1.5 MB: two chunks."""
CHAIN = chain(12)
ITEMS = [block(CHAIN, index, layout=LAYOUT) for index in range(12)]
IDS = [item.id for item in ITEMS]
MEMORY_BYTES = 8 * len(ITEMS[0].payload)
"""Less than the objects, so that they come and go."""

WORKER = """
import asyncio, sys
from kvstore.contracts import Missing
from penstock.errors import PenstockError
from tests.chaos.test_data_port import IDS, ITEMS, client_of, fetch, same

async def main():
    role, address, near = sys.argv[1:]
    client = client_of(address, near == "near")
    while True:
        try:
            if role == "writer":
                for start in range(0, 12, 3):
                    await client.put_many(ITEMS[start : start + 3], owner="w", lease_ttl_s=1)
                    print("turn", flush=True)
                await client.release("w")
            else:
                found = await fetch(client, IDS, owner="r", ttl_s=1)
                await client.release("r")
                for got, item in zip(found, ITEMS, strict=True):
                    if not isinstance(got, Missing) and not same(got, item):
                        print("WRONG", flush=True)
                print("turn", flush=True)
        except PenstockError:
            await asyncio.sleep(0.02)

asyncio.run(main())
"""


def client_of(address: str, near: bool) -> StoreClient:
    return StoreClient(
        address, fingerprint=FINGERPRINT, layout=LAYOUT, call_timeout_s=2, share_memory=near
    )


class Machine:
    """A node, a writer and a reader."""

    def __init__(self, near: bool) -> None:
        self.address = f"127.0.0.1:{free_port()}"
        self.near = "near" if near else "far"
        self.running: dict[str, subprocess.Popen[str]] = {}

    def start(self, name: str) -> None:
        arguments = ["-c", WORKER, name, self.address, self.near]
        if name == "node":
            arguments = ["-m", "kvstore", "--listen", self.address, "--memory", str(MEMORY_BYTES)]
        self.running[name] = subprocess.Popen(
            [sys.executable, *arguments], stdout=subprocess.PIPE, text=True
        )

    def wait(self, name: str, word: str) -> None:
        """For the next line of its output, which must be that one."""
        stdout = self.running[name].stdout
        assert stdout is not None
        assert stdout.readline().split()[0] == word

    def kill(self, name: str) -> str:
        """Returns what it had still to say."""
        process = self.running.pop(name)
        process.kill()
        said, _ = process.communicate()
        return said


async def settled(client: StoreClient) -> StoreStat:
    """Once nothing is reserved; within 5 s."""
    deadline = time.monotonic() + 5
    while True:
        try:
            stat = await client.stat()
            if not stat.reserved_bytes:
                return stat
        except StoreUnavailableError:
            pass
        assert time.monotonic() < deadline, "reserved bytes did not return"
        await asyncio.sleep(0.05)


@pytest.mark.parametrize("near", [False, True], ids=["port", "memory"])
async def test_whoever_is_killed_while_bytes_move_leaves_nothing_wrong(
    near: bool, pytestconfig: pytest.Config
) -> None:
    asked = pytestconfig.getoption("--chaos-schedules", None)
    drawn = random.Random(7 if asked is None else None)
    machine = Machine(near)
    client = client_of(machine.address, near)
    wrong = ""
    try:
        for name in ("node", "writer", "reader"):
            machine.start(name)
            await asyncio.to_thread(machine.wait, name, "ready" if name == "node" else "turn")
        for turn in range(asked or SCHEDULES):
            victim = ("node", "writer", "reader")[turn % 3]
            await asyncio.sleep(drawn.uniform(0, 0.08))
            wrong += machine.kill(victim)
            if victim == "writer":
                await settled(client)
            machine.start(victim)
            await asyncio.to_thread(machine.wait, victim, "ready" if victim == "node" else "turn")
        for name in ("writer", "reader"):
            wrong += machine.kill(name)
        stat = await settled(client)
        assert stat.integrity_failures == 0
        await client.release("w")
        await client.put_many(ITEMS[:6], owner="end", lease_ttl_s=30)
        assert all(map(same, await fetch(client, IDS[:6]), ITEMS[:6]))
        assert client.integrity_failures == 0
        found = await fetch(client, IDS)
        assert all(
            isinstance(got, Missing) or same(got, item)
            for got, item in zip(found, ITEMS, strict=True)
        )
    finally:
        await client.close()
        for name in list(machine.running):
            machine.kill(name)
    assert "WRONG" not in wrong
