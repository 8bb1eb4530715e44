"""The object tier: what is wanted twice outlives its node; a bad bucket costs only its objects."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.catalog import Catalog, Limits
from kvstore.client import StoreClient
from kvstore.codec import digest_now as blake3_digest
from kvstore.config import StoreConfig
from kvstore.fake import MemoryBlockStore
from kvstore.node import StoreNode
from kvstore.objects.bucket import Listed, Stored, open_bucket, pack, unpack
from kvstore.objects.tier import ObjectTier
from kvstore.policy.choice import Eviction, open_policy
from kvstore.server import start_server
from penstock.blocks import ObjectKind
from penstock.errors import UsageError
from tests.kvstore.objects import FINGERPRINT, LAYOUT, blocks_of, chain, fetch, same, state


def stored(seed: int, size: int = 1000) -> Stored:
    rng = random.Random(seed)
    data = rng.randbytes(size)
    return Stored(
        rng.randbytes(32),
        rng.choice(list(ObjectKind)),
        rng.randbytes(32),
        rng.randrange(1 << 20),
        blake3_digest(data),
        memoryview(data),
    )


async def eventually(holds: Callable[[], object], within_s: float = 5.0) -> None:
    until = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < until, "it did not come to pass"
        await asyncio.sleep(0.01)


def config(url: str, **changes: object) -> StoreConfig:
    base = {"object_url": url, "memory_bytes": 64 * 1024, "object_list_s": 0.2}
    return StoreConfig.model_validate(base | changes)


def store_on(node: StoreNode) -> MemoryBlockStore:
    return MemoryBlockStore(fingerprint=FINGERPRINT, layout=LAYOUT, node=node)


@given(st.integers(0, 1000), st.integers(0, 3000), st.data())
def test_a_name_s_bytes_are_whole_or_nothing(seed: int, size: int, data: st.DataObject) -> None:
    item = stored(seed, size)
    raw = bytearray(pack(item))
    assert unpack(item.id, bytes(raw)) == item
    assert unpack(bytes(32), bytes(raw)) is None
    cut = data.draw(st.integers(0, len(raw) - 1))
    assert unpack(item.id, bytes(raw[:cut])) is None
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    got = unpack(item.id, bytes(raw))
    assert got is None or blake3_digest(bytes(got.data)) != item.digest


def test_a_bucket_lists_what_it_holds_and_sweeps_what_a_killed_writer_left(tmp_path: Path) -> None:
    bucket = open_bucket(f"file://{tmp_path}/bucket")
    assert bucket.list() == []
    items = [stored(seed, 100 * seed + 1) for seed in range(5)]
    for item in items:
        bucket.put(item)
    folder = tmp_path / "bucket" / "v1"
    (folder / "ab").mkdir(exist_ok=True)
    (folder / "ab" / "strange.kv").write_bytes(b"?")
    half = folder / "new-0123456789abcdef"
    half.write_bytes(b"half")
    fresh = folder / "new-fedcba9876543210"
    fresh.write_bytes(b"half")

    os.utime(half, (1, 1))
    listed = {item.id: item for item in bucket.list()}
    assert {id_: item.size_bytes for id_, item in listed.items()} == {
        item.id: len(item.data) for item in items
    }
    assert all(abs(item.written_at - time.time()) < 60 for item in listed.values())
    assert not half.exists()
    assert fresh.exists()
    bucket.remove(items[0].id)
    bucket.remove(items[0].id)
    assert bucket.get(items[0].id) is None
    assert bucket.get(items[1].id) == items[1]


def test_an_address_that_nothing_serves_is_refused() -> None:
    with pytest.raises(UsageError, match="object tier"):
        open_bucket("nosuch://bucket")


async def test_what_two_requests_wanted_outlives_the_node(tmp_path: Path) -> None:
    of = chain(6)
    items = [*blocks_of(of), state(of, 1536)]
    url = f"file://{tmp_path}"
    first = await start_server(config(url))
    client = StoreClient(first.address, fingerprint=FINGERPRINT, layout=LAYOUT)
    await client.put_many(items, owner="one", lease_ttl_s=5)
    await fetch(client, [item.id for item in items], owner="one/restore")
    await fetch(client, [item.id for item in items[:4]], owner="two/restore")
    await eventually(lambda: first.node.stat().object_objects == 4)
    await client.close()
    await first.stop()
    # Nothing is left of the node: no memory, no disk, another port.
    other = await start_server(config(url))
    client = StoreClient(other.address, fingerprint=FINGERPRINT, layout=LAYOUT)
    await eventually(lambda: other.node.stat().object_objects == 4)
    ids = [item.id for item in items]
    assert await client.has(ids) == [True] * 4 + [False] * 3
    got = await fetch(client, ids, owner="three")
    assert [same(item, want) for item, want in zip(got, items, strict=True)] == [True] * 4 + [
        False
    ] * 3
    stat = await client.stat()
    assert (stat.object_hits, stat.object_quarantined) == (4, 0)
    # They came to memory: the next reader does not ask the bucket.
    await fetch(client, ids[:4], owner="four")
    assert (await client.stat()).object_hits == 4
    await client.close()
    await other.stop()


async def test_a_node_sees_what_another_one_wrote_and_deleted(tmp_path: Path) -> None:
    url = f"file://{tmp_path}"
    nodes = [StoreNode(config(url, object_after_uses=0)) for _ in range(2)]
    for node in nodes:
        await node.start()
    writer, reader = (store_on(node) for node in nodes)
    items = blocks_of(chain(4))
    ids = [item.id for item in items]
    await writer.put_many(items, owner="w", lease_ttl_s=0.01)
    await eventually(lambda: all(nodes[1].has(ids)))
    for item in items[:2]:
        open_bucket(url).remove(item.id)
    # Before the next listing it is a miss, not an error; afterwards it is known.
    assert [same(got, want) for got, want in zip(await fetch(reader, ids), items, strict=True)] == [
        False,
        False,
        True,
        True,
    ]
    await eventually(lambda: nodes[1].has(ids) == [False, False, True, True])
    for node in nodes:
        await node.close()


async def test_the_budget_holds_and_leased_objects_stay(tmp_path: Path) -> None:
    items = [item for seed in range(6) for item in blocks_of(chain(4, seed))]
    size = len(items[0].payload) * 10
    node = StoreNode(
        config(f"file://{tmp_path}", object_after_uses=0, object_bytes=size, memory_bytes=1 << 20)
    )
    await node.start()
    store = store_on(node)
    await store.put_many(items[:2], owner="w", lease_ttl_s=0.01)
    await eventually(lambda: node.stat().object_objects == 2)
    node.lease([item.id for item in items[:2]], owner="holder", ttl_s=60)
    await store.put_many(items[2:], owner="w2", lease_ttl_s=0.01)
    await eventually(lambda: node.stat().object_queued_bytes == 0)
    await eventually(lambda: len(open_bucket(f"file://{tmp_path}").list()) < 10)
    stat = node.stat()
    assert stat.object_evictions > 0
    assert stat.object_used_bytes <= size
    kept = {item.id for item in open_bucket(f"file://{tmp_path}").list()}
    assert {item.id for item in items[:2]} <= kept
    await node.close()


@dataclass
class Faulty:
    """A bucket in memory that does what it is told: fail, lie, hang, be full."""

    objects: dict[bytes, bytes] = field(default_factory=dict)
    plan: list[str] = field(default_factory=list)
    calls: int = 0
    hang_s: float = 0.4

    def _next(self, raw: bytes) -> bytes:
        self.calls += 1
        fault = self.plan.pop(0) if self.plan else "none"
        if fault == "fail":
            raise OSError(5, "the network is gone")
        if fault == "hang":
            time.sleep(self.hang_s)
        if fault == "flip" and raw:
            at = len(raw) * 7 // 11
            return raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]
        return raw[: len(raw) // 2] if fault == "cut" else raw

    def put(self, item: Stored) -> None:
        self.objects[item.id] = self._next(pack(item))

    def get(self, id_: bytes) -> Stored | None:
        raw = self._next(self.objects.get(id_, b""))
        return unpack(id_, raw)

    def remove(self, id_: bytes) -> None:
        self._next(b"")
        self.objects.pop(id_, None)

    def list(self) -> list[Listed]:
        self._next(b"")
        return [Listed(id_, max(len(raw) - 128, 1), 0.0) for id_, raw in self.objects.items()]


def tier_on(bucket: Faulty, *, capacity: int = 1 << 20, read_s: float = 0.15) -> ObjectTier:
    limits = Limits(capacity, 1 << 20, 1000, 1000, 60.0)
    catalog = Catalog(limits, policy=open_policy(Eviction.LRU, capacity), clock=time.monotonic)
    return ObjectTier(
        bucket,
        catalog,
        after_uses=0,
        queue_bytes=8000,
        readers=4,
        read_s=read_s,
        list_s=0.05,
    )


FAULTS = st.sampled_from(["none", "none", "fail", "flip", "cut", "hang"])


@settings(max_examples=25, deadline=None)
@given(plan=st.lists(FAULTS, max_size=25), seed=st.integers(0, 99))
def test_whatever_the_bucket_does_no_wrong_byte_and_no_long_wait(
    plan: list[str], seed: int
) -> None:
    async def run() -> None:
        bucket = Faulty(plan=list(plan), hang_s=0.2)
        tier = tier_on(bucket, read_s=0.1)
        tier.start()
        items = [stored(seed * 100 + number, 1 + 300 * number) for number in range(6)]
        for item in items:
            begun = time.monotonic()
            tier.wanted(item, owner="w")
            assert time.monotonic() - begun < 0.05
        await asyncio.sleep(0.1)
        for item in items:
            begun = time.monotonic()
            got = await tier.read(item.id)
            assert time.monotonic() - begun < 0.1 + 0.5
            if got is not None:
                assert bytes(got[1]) == bytes(item.data)
                assert (got[0].digest, got[0].position) == (item.digest, item.position)
        figures = tier.figures()
        assert figures["object_queued_bytes"] <= 8000
        await tier.close()

    asyncio.run(run())


async def test_a_slow_bucket_costs_one_deadline_and_rests() -> None:
    bucket = Faulty(hang_s=0.6)
    tier = tier_on(bucket, read_s=0.15)
    items = [stored(number) for number in range(4)]
    tier.start()
    for item in items:
        tier.wanted(item, owner="w")
    await eventually(lambda: tier.figures()["object_objects"] == 4)
    bucket.plan = ["hang"] * 30
    begun = time.monotonic()
    assert [await tier.read(item.id) for item in items] == [None] * 4
    assert time.monotonic() - begun < 0.15 * 2
    assert tier.has([item.id for item in items]) == [False] * 4
    assert tier.figures()["object_resting"] == 1
    bucket.plan = []
    await eventually(lambda: all(tier.has([item.id for item in items])))
    assert await tier.read(items[0].id) is not None
    await tier.close()


async def test_what_a_request_reads_next_is_on_its_way() -> None:
    bucket = Faulty(hang_s=0.05)
    tier = tier_on(bucket, read_s=5.0)
    tier.start()
    items = [stored(number, 300) for number in range(16)]
    for item in items:
        tier.wanted(item, owner="w")
    ids = [item.id for item in items]
    await eventually(lambda: all(tier.has(ids)))
    for expected in (False, True):
        bucket.plan = ["hang"] * 200
        if expected:
            tier.expect([b"not here" * 4, *ids])
        begun = time.monotonic()
        got = [await tier.read(id_) for id_ in ids]
        took = time.monotonic() - begun
        assert [bytes(found[1]) for found in got if found] == [bytes(item.data) for item in items]
        if not expected:
            alone = took
    print(f"16 objects of a bucket of 50 ms: {took:.2f} s, one by one {alone:.2f} s")
    assert took < 0.6 * alone
    # One that was read ahead in vain is asked for again.
    bucket.plan = ["none"]
    tier.expect(ids[:2])
    bucket.plan = ["none", "fail", "none"]
    assert await tier.read(ids[0]) is not None
    await asyncio.sleep(0.1)
    assert await tier.read(ids[1]) is not None
    await tier.close()


async def test_damaged_objects_are_quarantined_and_deleted() -> None:
    bucket = Faulty()
    tier = tier_on(bucket)
    tier.start()
    item = stored(3)
    tier.wanted(item, owner="w")
    await eventually(lambda: item.id in bucket.objects and tier.has([item.id])[0])
    raw = bytearray(bucket.objects[item.id])
    raw[-1] ^= 1
    bucket.objects[item.id] = bytes(raw)
    assert await tier.read(item.id) is None
    assert tier.counters.quarantined == 1
    await eventually(lambda: item.id not in bucket.objects)
    assert tier.has([item.id]) == [False]
    await tier.close()


async def test_the_queue_is_bounded_and_what_does_not_fit_is_counted() -> None:
    bucket = Faulty(plan=["none"] + ["hang"] * 50, hang_s=0.3)
    tier = tier_on(bucket)
    tier.start()
    await asyncio.sleep(0.02)
    for number in range(40):
        tier.wanted(stored(number), owner="w")
        assert tier.figures()["object_queued_bytes"] <= 8000
    assert tier.counters.skipped >= 30
    await tier.close()


async def test_only_what_another_request_wanted_is_written() -> None:
    bucket = Faulty()
    tier = tier_on(bucket)
    tier._after_uses = 2
    tier.start()
    item = stored(1)
    for owner in ("a", "a/restore", "b", "b/restore", "b"):
        tier.wanted(item, owner=owner)
    assert tier.figures()["object_queued_bytes"] == 0
    tier.wanted(item, owner="c")
    await eventually(lambda: item.id in bucket.objects)
    await tier.close()


async def test_a_bucket_that_hangs_does_not_keep_a_node_from_ending() -> None:
    bucket = Faulty(plan=["hang"] * 5, hang_s=5.0)
    tier = tier_on(bucket)
    tier.start()
    await asyncio.sleep(0.05)
    begun = time.monotonic()
    await tier.close()
    assert time.monotonic() - begun < 1.0
