"""Parts of `penstock bench store`: the index, a long prompt's plan, transfer under compute."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Sequence

from redis.asyncio import Redis

from bench.redis_peer import own_redis
from bench.report import Row
from bench.stats import finite, median, percentile, ratio
from kvstore.client import StoreClient
from kvstore.contracts import Buffer, Location, StoreObject
from kvstore.index.redis import RedisIndex
from penstock.blocks import BLOCK_TOKENS, CacheLayout, ObjectKind
from penstock.errors import PenstockError
from penstock.identity import Chain, fingerprint, namespace
from prefill.planner import plan_chunks
from prefill.restore import Restorer, Rule

LOOKUP_IDS = 4096
LOOKUPS = 200
PIPELINES = 20
ENTRIES = 65_536
PLAN_TOKENS = 1_000_000
CHUNK_TOKENS = 8192
CHUNKS = 16
_PACE = 5.0
"""Time of a chunk's compute by the time of its transfer."""
_FINGERPRINT = fingerprint({"model": "bench-store"})


async def index_rows() -> list[Row]:
    """One MGET beside a pipeline of GETs, commits a second, memory an entry; none without Redis."""
    with own_redis() as url:
        if url is None:
            return []
        index, plain = (
            RedisIndex(url, lookup_timeout_s=5.0, write_timeout_s=10.0),
            Redis.from_url(url),
        )
        try:
            before = int((await plain.info("memory"))["used_memory"])
            place = Location("node-of-the-bench", 1_700_000_000_000, 1 << 20)
            entries = [(secrets.token_bytes(32), place) for _ in range(ENTRIES)]
            began_s = time.perf_counter()
            await index.add(entries)
            add_s = time.perf_counter() - began_s
            entry_bytes = (int((await plain.info("memory"))["used_memory"]) - before) / ENTRIES
            ids = [id_ for id_, _ in entries[:LOOKUP_IDS]]
            mget, pipelined = [], []
            for turn in range(LOOKUPS):
                began_s = time.perf_counter()
                found = await index.lookup(ids)
                mget.append(time.perf_counter() - began_s)
                if any(place is None for place in found):
                    raise PenstockError("Redis did not keep what the benchmark put into it")
                if turn % (LOOKUPS // PIPELINES) == 0:
                    pipelined.append(await _pipeline(plain, ids))
        finally:
            await index.close()
            await plain.aclose()
    return [
        {
            "ids": LOOKUP_IDS,
            "n": LOOKUPS,
            "mget_p50_ms": median(mget) * 1e3,
            "mget_p99_ms": percentile(mget, 99) * 1e3,
            "pipeline_n": PIPELINES,
            "pipeline_p50_ms": median(pipelined) * 1e3,
            "times_faster": ratio(median(pipelined), median(mget)),
            "commits_per_s": finite(ENTRIES / add_s),
            "bytes_per_entry": entry_bytes,
        }
    ]


async def _pipeline(redis: Redis, ids: Sequence[bytes]) -> float:
    began_s = time.perf_counter()
    pipeline = redis.pipeline(transaction=False)
    for id_ in ids:
        pipeline.get(b"kv:o:" + id_)
    await pipeline.execute()
    return time.perf_counter() - began_s


class _Nothing:
    """A sequence to which nothing is attached."""

    async def reset(self) -> None: ...

    async def load_blocks(self, first: int, payloads: Sequence[Buffer]) -> None: ...

    async def load_state(self, position: int, payload: Buffer) -> None: ...

    async def replay(self, start: int) -> None: ...

    async def replay_some(self, tokens: Sequence[int]) -> float:
        return 0.0


async def plan_row(client: StoreClient, layout: CacheLayout, *, repeats: int) -> Row:
    """A prompt of a million tokens, of which the store has nothing: hash, look-up, plan."""
    parts: dict[str, list[float]] = {"hash": [], "look_up": [], "plan": []}
    for number in range(repeats + 1):
        tokens = [number] * PLAN_TOKENS
        start = Chain.start(_FINGERPRINT, namespace(b"bench", "plan"))
        began_s = time.perf_counter()
        chain = start.extend(tokens)
        hashed_s = time.perf_counter()
        restorer = Restorer(client, chain, owner="bench", lease_ttl_s=60.0, rule=Rule(layout))
        if (await restorer.restore(_Nothing())).position:
            raise PenstockError("the store has a prompt that it never saw")
        looked_up_s = time.perf_counter()
        plan_chunks(PLAN_TOKENS, start=0, chunk_tokens=CHUNK_TOKENS)
        planned_s = time.perf_counter()
        if number:
            parts["hash"].append(hashed_s - began_s)
            parts["look_up"].append(looked_up_s - hashed_s)
            parts["plan"].append(planned_s - looked_up_s)
    total = [sum(turn) for turn in zip(*parts.values(), strict=True)]
    return {
        "tokens": PLAN_TOKENS,
        "n": repeats,
        **{f"{name}_ms": median(seconds) * 1e3 for name, seconds in parts.items()},
        "total_ms": median(total) * 1e3,
        "total_high_ms": max(total) * 1e3,
    }


async def overlap_row(
    writer: StoreClient, reader: StoreClient, shape: CacheLayout, *, chunk_blocks: int
) -> Row:
    """A producer that takes its time for each chunk, and a reader that waits for all of them."""
    start = Chain.start(_FINGERPRINT, namespace(b"bench", secrets.token_hex(8)))
    chain = start.extend([1] * (BLOCK_TOKENS * chunk_blocks * (CHUNKS + 1)))
    payload = secrets.token_bytes(shape.block_bytes)
    items = [
        StoreObject(ObjectKind.BLOCK, id_, chain.parent(index), index, payload)
        for index, id_ in enumerate(chain.blocks)
    ]
    chunks = [items[at : at + chunk_blocks] for at in range(0, len(items), chunk_blocks)]

    async def publish(chunk: Sequence[StoreObject]) -> None:
        await writer.put_many(chunk, owner="writer", lease_ttl_s=120.0)

    async def hold(ids: Sequence[bytes]) -> float:
        async for item in reader.get(ids, owner="reader", lease_ttl_s=120.0, wait_s=60.0):
            if not isinstance(item, StoreObject):
                raise PenstockError("the store lost what the benchmark put into it")
        return time.perf_counter()

    began_s = time.perf_counter()
    await publish(chunks[-1])
    transfer_s = await hold([item.id for item in chunks[-1]]) - began_s
    holding = asyncio.create_task(hold([item.id for item in items[: CHUNKS * chunk_blocks]]))
    publishing: asyncio.Task[None] | None = None
    began_s = time.perf_counter()
    for chunk in chunks[:CHUNKS]:
        await asyncio.sleep(_PACE * transfer_s)
        if publishing is not None:
            await publishing
        publishing = asyncio.create_task(publish(chunk))
    computed_s = time.perf_counter()
    held_s = await holding
    if publishing is not None:
        await publishing
    return {
        "chunks": CHUNKS,
        "chunk_bytes": chunk_blocks * shape.block_bytes,
        "one_transfer_ms": transfer_s * 1e3,
        "compute_ms": (computed_s - began_s) * 1e3,
        "exposed_ms": (held_s - computed_s) * 1e3,
        "exposed_transfers": ratio(held_s - computed_s, transfer_s),
        "efficiency": ratio(computed_s - began_s, held_s - began_s),
    }
