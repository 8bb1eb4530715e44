"""`penstock bench store`: how fast blocks move through the store's client, beside plain TCP.

A store node of its own; puts, gets and lookups of 256-token blocks over loopback, each round
followed by the same bytes over a bare TCP connection; the same blocks handed over in shared memory,
beside plain copies; then the parts in `bench.store_parts`.
"""

from __future__ import annotations

import asyncio
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import uvloop

from bench import tcp_peer
from bench.report import Report, Row
from bench.stats import finite, low_median_high, median, ratio
from bench.store_parts import CHUNKS, LOOKUP_IDS, index_rows, overlap_row, plan_row
from kvstore.client import StoreClient
from kvstore.codec import digest_now
from kvstore.contracts import StoreObject
from penstock.blocks import BLOCK_TOKENS, CacheLayout, Component, ComponentKind, ObjectKind
from penstock.errors import PenstockError
from penstock.identity import Chain, fingerprint, namespace

_RATIO = 4
_ROUNDS_HELD = 3
"""What the node has room for: from then on each put takes the place of older blocks."""
_WARM_ROUNDS = 3
_FINGERPRINT = fingerprint({"model": "bench-store"})
_SHOWS_NOT = (
    "a network: both ends share this machine's cores and memory",
    "several clients at once",
    "a node that is not full yet: memory that it never used before is slower to fill",
    "where the table `index` is empty: Redis; this machine has no redis-server",
)


def layout(block_bytes: int) -> CacheLayout:
    """One component whose block has about `block_bytes`."""
    row = max(8, block_bytes * _RATIO // BLOCK_TOKENS // 8 * 8)
    return CacheLayout((Component("bench.rows", ComponentKind.COMPRESSED, _RATIO, row),))


def run(*, block_kib: int, blocks: int, repeats: int) -> Report:
    began_s = time.monotonic()
    shape = layout(block_kib << 10)
    total = shape.block_bytes * blocks
    chunk_blocks = max(1, blocks // 4)
    with _node(_ROUNDS_HELD * total + (1 << 20)) as address, _peer() as peer:
        rounds = uvloop.run(_measure(address, peer, shape, blocks=blocks, repeats=repeats))
    memory = 2 * (CHUNKS + 1) * chunk_blocks * shape.block_bytes
    with _node(memory + (64 << 20)) as address:
        plan, overlap = uvloop.run(
            _parts(address, shape, repeats=repeats, chunk_blocks=chunk_blocks)
        )
    index = uvloop.run(index_rows())
    return Report(
        bench="store",
        settings={
            "block_bytes": shape.block_bytes,
            "blocks": blocks,
            "round_bytes": total,
            "repeats": repeats,
        },
        tables={
            "bytes": rate_rows(rounds, total),
            "shared memory": [shared_row(rounds, total)],
            "lookups": [_lookup_row(rounds["has"])],
            "index": index,
            "plan": [plan],
            "overlap": [overlap],
        },
        shows_not=_SHOWS_NOT,
        wall_s=time.monotonic() - began_s,
    )


def rate_rows(rounds: dict[str, list[float]], total_bytes: int) -> list[Row]:
    """GB/s of each direction and what share of plain TCP that is. Pure."""
    rows: list[Row] = []
    for name in ("put", "get"):
        gb_s = {
            kind: [total_bytes / 1e9 / seconds for seconds in rounds[f"{kind}{name}"]]
            for kind in ("", "tcp ")
        }
        low, middle, high = low_median_high(gb_s[""])
        plain = low_median_high(gb_s["tcp "])[1]
        rows.append(
            {
                "direction": name,
                "n": len(gb_s[""]),
                "store_gb_s": finite(middle),
                "low": finite(low),
                "high": finite(high),
                "tcp_gb_s": finite(plain),
                "share_of_tcp": ratio(middle, plain),
            }
        )
    return rows


def shared_row(rounds: dict[str, list[float]], total_bytes: int) -> Row:
    """GB/s of a hand-over in memory, whole and without its digest, beside plain copies. Pure."""
    whole, digest, plain, over = (
        median(rounds[name]) for name in ("shared", "digest", "memcpy", "memcpy over")
    )
    moved = [a - b for a, b in zip(rounds["shared"], rounds["digest"], strict=True)]
    # Writer and node hash each byte; the node does so beside the writer's next copies.
    put = [a - 2 * b for a, b in zip(rounds["shared put"], rounds["digest"], strict=True)]
    put_whole = median(rounds["shared put"])
    return {
        "n": len(moved),
        "get_gb_s": finite(total_bytes / 1e9 / whole),
        "digest_gb_s": finite(total_bytes / 1e9 / digest),
        "without_digest_gb_s": ratio(total_bytes / 1e9, max(0.0, median(moved))),
        "memcpy_gb_s": finite(total_bytes / 1e9 / plain),
        "share_of_memcpy": ratio(plain, max(0.0, median(moved))),
        "memcpy_over_gb_s": finite(total_bytes / 1e9 / over),
        "share_of_memcpy_over": ratio(over, max(0.0, median(moved))),
        "put_gb_s": finite(total_bytes / 1e9 / put_whole),
        "put_without_digests_gb_s": ratio(total_bytes / 1e9, max(0.0, median(put))),
        "put_share_of_memcpy": ratio(plain, max(0.0, median(put))),
        "put_share_of_memcpy_over": ratio(over, max(0.0, median(put))),
    }


async def _parts(
    address: str, shape: CacheLayout, *, repeats: int, chunk_blocks: int
) -> tuple[Row, Row]:
    writer, reader = (
        StoreClient(
            address,
            fingerprint=_FINGERPRINT,
            layout=shape,
            call_timeout_s=60.0,
            share_memory=False,
        )
        for _ in range(2)
    )
    try:
        return (
            await plan_row(reader, shape, repeats=repeats),
            await overlap_row(writer, reader, shape, chunk_blocks=chunk_blocks),
        )
    finally:
        await writer.close()
        await reader.close()


def _lookup_row(seconds: Sequence[float]) -> Row:
    low, middle, high = low_median_high(seconds)
    return {
        "call": f"has() of {LOOKUP_IDS:,} ids",
        "n": len(seconds),
        "median_ms": middle * 1e3,
        "low_ms": low * 1e3,
        "high_ms": high * 1e3,
        "us_per_id": middle * 1e6 / LOOKUP_IDS,
    }


async def _measure(
    address: str, peer: socket.socket, shape: CacheLayout, *, blocks: int, repeats: int
) -> dict[str, list[float]]:
    """Seconds of each round. The first ones fill the node and are not counted."""
    rounds: dict[str, list[float]] = {
        name: []
        for name in (
            *("put", "get", "tcp put", "tcp get"),
            *("shared", "shared put", "digest", "memcpy", "memcpy over", "has"),
        )
    }
    total = shape.block_bytes * blocks
    payload = random.Random(0).randbytes(shape.block_bytes)
    # As on another host; a second client reads as on the same one.
    client, near = (
        StoreClient(
            address,
            fingerprint=_FINGERPRINT,
            layout=shape,
            call_timeout_s=60.0,
            share_memory=is_near,
        )
        for is_near in (False, True)
    )
    try:
        for number in range(repeats + _WARM_ROUNDS):
            for owner in ("bench", "b", "near"):
                await client.release(owner)
            chain = _chain(blocks, number)
            items = [
                StoreObject(ObjectKind.BLOCK, id_, chain.parent(index), index, payload)
                for index, id_ in enumerate(chain.blocks)
            ]
            began_s = time.perf_counter()
            fresh = await client.put_many(items, owner="bench", lease_ttl_s=120.0)
            put_s = time.perf_counter()
            got = [item async for item in client.get(chain.blocks, owner="b", lease_ttl_s=60.0)]
            get_s = time.perf_counter()
            if not all(fresh) or not all(isinstance(item, StoreObject) for item in got):
                raise PenstockError("the store did not keep what the benchmark put into it")
            del got
            own = _chain(blocks, number, "near")
            near_items = [
                StoreObject(ObjectKind.BLOCK, id_, own.parent(index), index, payload)
                for index, id_ in enumerate(own.blocks)
            ]
            near_s = time.perf_counter()
            if not all(await near.put_many(near_items, owner="near", lease_ttl_s=120.0)):
                raise PenstockError("the store did not keep what the benchmark wrote into it")
            near_s = time.perf_counter() - near_s
            shared_s, digest_s, memcpy_s, over_s = await _shared_round(near, chain.blocks)
            tcp_put_s, tcp_get_s = await asyncio.to_thread(_tcp_round, peer, total)
            ids = [*chain.blocks, *_chain(LOOKUP_IDS - blocks, number, "absent").blocks]
            lookup_s = time.perf_counter()
            found = await client.has(ids)
            lookup_s = time.perf_counter() - lookup_s
            if sum(found) != blocks:
                raise PenstockError(f"has() found {sum(found)} of {blocks} blocks")
            if number >= _WARM_ROUNDS:
                for name, seconds in (
                    ("put", put_s - began_s),
                    ("get", get_s - put_s),
                    ("tcp put", tcp_put_s),
                    ("tcp get", tcp_get_s),
                    ("shared", shared_s),
                    ("shared put", near_s),
                    ("digest", digest_s),
                    ("memcpy", memcpy_s),
                    ("memcpy over", over_s),
                    ("has", lookup_s),
                ):
                    rounds[name].append(seconds)
    finally:
        await client.close()
        await near.close()
    return rounds


async def _shared_round(
    client: StoreClient, ids: Sequence[bytes]
) -> tuple[float, float, float, float]:
    """Seconds to hold all objects, to hash them once, and to copy as much into new memory and into
    memory that is there already.
    """
    began_s = time.perf_counter()
    got = [item async for item in client.get(ids, owner="near", lease_ttl_s=60.0)]
    shared_s = time.perf_counter() - began_s
    views = [memoryview(item.payload) for item in got if isinstance(item, StoreObject)]
    digest_s = _seconds(lambda: [digest_now(view) for view in views])
    sources = [bytes(view) for view in views]
    # What the hand-over took is free again: plain copies find as much memory as it did.
    got.clear()
    views.clear()
    copies: list[memoryview] = []

    def copy() -> None:
        for source in sources:
            copies.append(memoryview(np.empty(len(source), np.uint8).data))
            copies[-1][:] = source

    def copy_over() -> None:
        for target, source in zip(copies, sources, strict=True):
            target[:] = source

    return shared_s, digest_s, _seconds(copy), _seconds(copy_over)


def _chain(blocks: int, number: int, tenant: str = "bench") -> Chain:
    start = Chain.start(_FINGERPRINT, namespace(b"bench", tenant))
    return start.extend([number] * (blocks * BLOCK_TOKENS))


def _tcp_round(peer: socket.socket, total: int) -> tuple[float, float]:
    """Seconds to send and to fetch `total` bytes."""
    buffer, payload = bytearray(tcp_peer.CHUNK_BYTES), bytes(tcp_peer.CHUNK_BYTES)

    def put() -> None:
        peer.sendall(tcp_peer.HEAD.pack(tcp_peer.PUT, total))
        for start in range(0, total, len(payload)):
            peer.sendall(payload[: min(len(payload), total - start)])
        tcp_peer.receive(peer, 1, buffer)

    def get() -> None:
        peer.sendall(tcp_peer.HEAD.pack(tcp_peer.GET, total))
        tcp_peer.receive(peer, total, buffer)

    return _seconds(put), _seconds(get)


def _seconds(work: Callable[[], object]) -> float:
    began_s = time.perf_counter()
    work()
    return time.perf_counter() - began_s


@contextmanager
def _node(memory_bytes: int) -> Iterator[str]:
    from kvstore.config import StoreConfig
    from penstock.child import ChildProcess

    child = ChildProcess(
        "kvstore",
        "kvstore",
        ["--config-stdin", "--exit-with-parent"],
        first_line=StoreConfig(memory_bytes=memory_bytes).model_dump_json(),
    )
    try:
        child.spawn()
        yield child.await_ready(30.0)
    finally:
        child.stop()


@contextmanager
def _peer() -> Iterator[socket.socket]:
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.tcp_peer"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
            yield connection
        process.wait(10)
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
