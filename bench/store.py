"""`penstock bench store`: how fast blocks move through the store's client, beside plain TCP.

A store node of its own; puts, gets and lookups of 256-token blocks over loopback, each round
followed by the same bytes over a bare TCP connection.
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

from bench import tcp_peer
from bench.report import Report, Row
from bench.stats import finite, low_median_high, ratio
from kvstore.client import StoreClient
from kvstore.contracts import StoreObject
from penstock.blocks import BLOCK_TOKENS, CacheLayout, Component, ComponentKind, ObjectKind
from penstock.errors import PenstockError
from penstock.identity import Chain, fingerprint, namespace

LOOKUP_IDS = 4096
_RATIO = 4
_FINGERPRINT = fingerprint({"model": "bench-store"})
_SHOWS_NOT = (
    "a network: both ends share this machine's cores and memory",
    "several clients at once, a Redis index, or a node that evicts",
)


def layout(block_bytes: int) -> CacheLayout:
    """One component whose block has about `block_bytes`."""
    row = max(8, block_bytes * _RATIO // BLOCK_TOKENS // 8 * 8)
    return CacheLayout((Component("bench.rows", ComponentKind.COMPRESSED, _RATIO, row),))


def run(*, block_kib: int, blocks: int, repeats: int) -> Report:
    began_s = time.monotonic()
    shape = layout(block_kib << 10)
    total = shape.block_bytes * blocks
    with _node(2 * (repeats + 1) * total + (64 << 20)) as address, _peer() as peer:
        rounds = asyncio.run(_measure(address, peer, shape, blocks=blocks, repeats=repeats))
    return Report(
        bench="store",
        settings={
            "block_bytes": shape.block_bytes,
            "blocks": blocks,
            "round_bytes": total,
            "repeats": repeats,
        },
        tables={"bytes": rate_rows(rounds, total), "lookups": [_lookup_row(rounds["has"])]},
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
    """Seconds of each round. The first round warms up and is not counted."""
    rounds: dict[str, list[float]] = {
        name: [] for name in ("put", "get", "tcp put", "tcp get", "has")
    }
    total = shape.block_bytes * blocks
    payload = random.Random(0).randbytes(shape.block_bytes)
    client = StoreClient(address, fingerprint=_FINGERPRINT, layout=shape, call_timeout_s=60.0)
    try:
        for number in range(repeats + 1):
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
            tcp_put_s, tcp_get_s = await asyncio.to_thread(_tcp_round, peer, total)
            ids = [*chain.blocks, *_chain(LOOKUP_IDS - blocks, number, "absent").blocks]
            lookup_s = time.perf_counter()
            found = await client.has(ids)
            lookup_s = time.perf_counter() - lookup_s
            if sum(found) != blocks:
                raise PenstockError(f"has() found {sum(found)} of {blocks} blocks")
            if number:
                for name, seconds in (
                    ("put", put_s - began_s),
                    ("get", get_s - put_s),
                    ("tcp put", tcp_put_s),
                    ("tcp get", tcp_get_s),
                    ("has", lookup_s),
                ):
                    rounds[name].append(seconds)
    finally:
        await client.close()
    return rounds


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


def _seconds(work: Callable[[], None]) -> float:
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
