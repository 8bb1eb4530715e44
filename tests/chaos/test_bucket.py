"""A node is killed while it writes to its bucket; another one goes on from there."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from pathlib import Path

from kvstore.client import StoreClient
from kvstore.config import StoreConfig, StoreSpec
from kvstore.contracts import StoreObject
from kvstore.server import start_server
from model.fake import FakeEngine
from penstock.errors import PenstockError
from tests.decode.pair import eventually, oracle, pair, prompt_of
from tests.kvstore.objects import FINGERPRINT, LAYOUT, blocks_of, chain, fetch, same

KILLS = 2


def node_process(url: str) -> tuple[subprocess.Popen[str], str]:
    spec = StoreSpec(object_url=url, object_after_uses=0, memory_bytes=8 << 20)
    process = subprocess.Popen(
        [sys.executable, "-m", "kvstore", "--config-stdin"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(spec.model_dump_json() + "\n")
    process.stdin.flush()
    word, address = process.stdout.readline().split()
    assert word == "ready"
    return process, address


async def test_a_node_killed_while_it_writes_leaves_whole_objects_only(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/bucket"
    items: dict[bytes, StoreObject] = {}
    for number in range(KILLS):
        process, address = node_process(url)
        client = StoreClient(address, fingerprint=FINGERPRINT, layout=LAYOUT)
        mine = [item for seed in range(12) for item in blocks_of(chain(8, 100 * number + seed))]
        items |= {item.id: item for item in mine}

        async def put() -> None:
            with contextlib.suppress(PenstockError):
                await client.put_many(mine, owner="w", lease_ttl_s=1)  # noqa: B023

        putting = asyncio.create_task(put())
        # Each time at another place of the stream of writes.
        await asyncio.sleep(0.02 + 0.05 * number)
        process.kill()
        process.wait()
        await putting
        await client.close()
    # What a write was killed in lies there unfinished; no name points at it.
    heir = await start_server(StoreConfig(object_url=url, memory_bytes=8 << 20))
    client = StoreClient(heir.address, fingerprint=FINGERPRINT, layout=LAYOUT)
    await eventually(lambda: heir.node.stat().object_objects)
    there = [item for item in items.values() if heir.node.has([item.id])[0]]
    got = await fetch(client, [item.id for item in there])
    assert all(same(found, item) for found, item in zip(got, there, strict=True))
    assert heir.node.stat().object_quarantined == 0
    print(f"{len(there)} of {len(items)} objects were in the bucket after {KILLS} kills, all whole")
    assert there
    await client.close()
    await heir.stop()


async def test_a_prompt_that_two_wanted_is_resumed_from_the_bucket(tmp_path: Path) -> None:
    """Workers of another node that never saw the prompt; the first one's memory is gone."""
    config = StoreConfig(object_url=f"file://{tmp_path}", memory_bytes=4 << 20, object_list_s=0.2)
    info = FakeEngine().info
    prompt = prompt_of(9000)
    for life in range(2):
        server = await start_server(config)
        client = StoreClient(server.address, fingerprint=info.fingerprint, layout=info.layout)
        async with pair(store=client) as workers:
            if life:
                await eventually(lambda: server.node.stat().object_objects >= 36)  # noqa: B023
            for turn in range(2 - life):
                got = await workers.ask(prompt, max_tokens=12)
                assert got.token_ids == oracle(prompt, max_tokens=12).token_ids
                # The end of the prompt is no multiple of 128: its state is not kept.
                assert got.cached_tokens == (8960 if life or turn else 0), (life, turn)
            if not life:
                # 35 blocks and the state.
                await eventually(lambda: server.node.stat().object_objects >= 36)  # noqa: B023
        await client.close()
        await server.stop()
