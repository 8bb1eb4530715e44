"""Mirrors: what every one must answer, and that the real one holds what the node holds whatever was
cut, restarted or too slow.
"""

from __future__ import annotations

import asyncio
import random
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

import grpc
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvstore.client import StoreClient
from kvstore.config import StoreConfig
from kvstore.contracts import StoreObject
from kvstore.events import EventFeed
from kvstore.mirror import NAME_BYTES, Mirror, resumable_tokens, states_to_try
from kvstore.mirror_client import StoreMirror
from kvstore.mirror_fake import FakeMirror
from kvstore.mirror_table import NameSet, NodeView, names_of
from kvstore.server import StoreServer, start_server
from penstock.errors import OverloadedError, StoreUnavailableError
from penstock.peers import Peers
from protos.penstock.kv.v1 import kv_pb2
from tests.kvstore.objects import FINGERPRINT, LAYOUT, block, blocks_of, chain, state

SUBSCRIBE = "/penstock.kv.v1.KvStore/Subscribe"


def caught_up(mirror: StoreMirror, server: StoreServer) -> bool:
    view, node = mirror.views[0], server.node
    return (view.epoch, view.seq) == (node.epoch, node.feed.seq)


def equal(mirror: StoreMirror, server: StoreServer) -> bool:
    held = names_of(b"".join(id_[:NAME_BYTES] for id_ in server.node.ids()))
    names = mirror.views[0].names
    return len(names) == len(held) and bool(names.has(held).all())


async def until(true: Callable[[], bool], within_s: float = 5.0) -> None:
    deadline = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < deadline, "it never came true"
        await asyncio.sleep(0.005)


@dataclass
class World:
    mirror: Mirror
    store: Callable[[Sequence[StoreObject]], object]
    remove: Callable[[Sequence[bytes]], object]


@pytest.fixture(params=["fake", "real"])
async def world(request: pytest.FixtureRequest) -> AsyncIterator[World]:
    if request.param == "fake":
        fake = FakeMirror()

        async def fake_store(items: Sequence[StoreObject]) -> None:
            fake.store(item.id for item in items)

        async def fake_remove(ids: Sequence[bytes]) -> None:
            fake.remove(ids)

        yield World(fake, fake_store, fake_remove)
        return
    server = await start_server(StoreConfig(memory_bytes=8 << 20, node_id="node", heartbeat_s=0.1))
    client = StoreClient(server.address, fingerprint=FINGERPRINT, layout=LAYOUT)
    mirror = StoreMirror([server.address])
    mirror.start()

    async def store(items: Sequence[StoreObject]) -> None:
        await client.put_many(items, owner="w", lease_ttl_s=5)
        await client.release("w")
        await until(lambda: caught_up(mirror, server))

    async def remove(ids: Sequence[bytes]) -> None:
        server.node.evict(list(ids), size_bytes=0, memory=True, disk=False)
        await until(lambda: caught_up(mirror, server))

    yield World(mirror, store, remove)
    await mirror.close()
    await client.close()
    await server.stop(0.1)


async def test_the_longest_resumable_prefix_is_told_without_a_call(world: World) -> None:
    prompt = chain(40, tail=77)
    assert world.mirror.resumable(prompt).tokens == 0
    await world.store([*blocks_of(prompt), state(prompt, 40 * 256 + 77), state(prompt, 8192)])
    found = world.mirror.resumable(prompt)
    assert (found.tokens, found.overlap_tokens) == (len(prompt.tokens), 40 * 256)
    assert found.blocks_by_node == {"node": 40}
    assert found.age_s < 5
    await world.remove([prompt.state_id(len(prompt.tokens))])
    assert world.mirror.resumable(prompt).tokens == 8192
    await world.remove([prompt.blocks[31]])
    found = world.mirror.resumable(prompt)
    assert (found.tokens, found.overlap_tokens) == (0, 31 * 256)
    await world.store([state(prompt, 31 * 256 + 128), block(chain(1, seed=9), 0)])
    assert world.mirror.resumable(prompt).tokens == 31 * 256 + 128, "inside the block that is gone"
    assert world.mirror.nodes_of(prompt.blocks[30:32]) == [("node",), ()]
    assert world.mirror.resumable(chain(3, seed=5)).tokens == 0, "another prompt"


def test_states_are_tried_from_the_end_and_not_without_end() -> None:
    short = chain(2, tail=100)
    assert list(states_to_try(short, 2)) == [612, 512, 384, 256, 128]
    assert list(states_to_try(short, 1)) == [384, 256, 128]
    assert list(states_to_try(short, 0)) == [128]
    asked: list[int] = []

    def has(ids: Sequence[bytes]) -> list[bool]:
        asked.append(len(ids))
        return [False] * len(ids)

    assert resumable_tokens(chain(400), 400, has) == 0
    assert sum(asked) == 512 + 4, "65,536 tokens at every 128, then every 8,192"


@settings(max_examples=80, deadline=None)
@given(
    steps=st.lists(
        st.tuples(st.sets(st.integers(0, 60)), st.sets(st.integers(0, 60))), max_size=12
    ),
    least=st.integers(1, 30),
)
def test_a_name_set_is_a_set(steps: list[tuple[set[int], set[int]]], least: int) -> None:
    names, truth = NameSet(), set[int]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kvstore.mirror_table._LEAST_MERGE", least)
        for stored, removed in steps:
            stored = stored - removed
            names.change(as_names(stored), as_names(removed))
            truth = (truth - removed) | stored
            every = as_names(range(61))
            assert names.has(every).tolist() == [name in truth for name in range(61)]
    assert len(names) == len(truth)


def as_names(values: object) -> np.ndarray:
    # Spread over all 64 bits, also those beyond a signed number.
    return np.array([value * 0x0431_0000_0000_0001 for value in values], np.uint64)  # type: ignore


def test_a_million_names_fit_in_little_memory_and_are_looked_up_quickly() -> None:
    view = NodeView()
    raw = random.Random(3).randbytes(8_000_000)
    view.begin()
    for start in range(0, len(raw), 65_536):
        part = raw[start : start + 65_536]
        view.take(
            kv_pb2.IndexEvents(epoch=1, stored=part, snapshot=True, complete=len(part) < 65_536), 0
        )
    names = view.names
    assert len(names) == 1_000_000
    for turn in range(40):
        view.take(kv_pb2.IndexEvents(epoch=1, seq=turn, removed=raw[turn * 8000 :][:8000]), 0)
    assert names._sorted.nbytes + sys.getsizeof(names._changed) < 10_000_000
    chain_ = names_of(raw[-8 * 4096 :])
    begun = time.perf_counter()
    for _ in range(10):
        assert names.has(chain_).all()
    print(f"a look-up of 4,096 of a million names: {(time.perf_counter() - begun) * 100:.2f} ms")
    assert time.perf_counter() - begun < 1


@pytest.mark.parametrize(
    "wrong",
    [
        kv_pb2.IndexEvents(epoch=1, seq=1, stored=b"1234567"),
        kv_pb2.IndexEvents(epoch=2, seq=1),
        kv_pb2.IndexEvents(epoch=1, seq=0),
        kv_pb2.IndexEvents(epoch=1, seq=1, snapshot=True),
    ],
)
def test_events_that_do_not_follow_are_refused_and_the_picture_stays(
    wrong: kv_pb2.IndexEvents,
) -> None:
    view = NodeView()
    view.begin()
    view.take(kv_pb2.IndexEvents(epoch=1, seq=1, stored=b"x" * 8, snapshot=True, complete=True), 5)
    with pytest.raises(StoreUnavailableError):
        view.take(wrong, 6)
    assert (len(view.names), view.seq, view.heard_at) == (1, 1, 5)
    view.begin()
    with pytest.raises(StoreUnavailableError, match="order"):
        view.take(kv_pb2.IndexEvents(epoch=1, seq=2), 7)
    assert len(view.names) == 1


async def test_a_subscriber_that_takes_too_little_is_cut_and_keeps_nothing() -> None:
    feed = EventFeed(StoreConfig(max_event_backlog=10, max_subscribers=1), ids=list)
    with feed.subscribed() as subscriber:
        with pytest.raises(OverloadedError, match="1 mirrors"), feed.subscribed():
            pass
        for number in range(10):
            feed.changed(number.to_bytes(32, "big"), True)
            feed.changed(number.to_bytes(32, "little"), True)
            feed.changed(number.to_bytes(32, "little"), False)
        assert set((await subscriber.changes(0)).values()) == {True, False}, "merged by name"
        for number in range(11):
            feed.changed(number.to_bytes(32, "little"), True)
        assert subscriber._pending == {}
        with pytest.raises(OverloadedError, match="subscribe again"):
            await subscriber.changes(0)
    assert len(feed) == 0


async def test_who_has_no_token_cannot_subscribe_and_no_more_than_allowed_can() -> None:
    peers = Peers(cluster_token="t" * 20)
    server = await start_server(StoreConfig(memory_bytes=1 << 20, max_subscribers=2), peers)
    channel = grpc.aio.insecure_channel(server.address)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await channel.unary_stream(SUBSCRIBE)(b"", timeout=5).read()
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    mirrors = [StoreMirror([server.address], peers=peers) for _ in range(3)]
    for mirror in mirrors:
        mirror.start()
    await until(lambda: sum(mirror.age_s < 5 for mirror in mirrors) == 2)
    await until(lambda: sum(mirror.resyncs for mirror in mirrors) > 0)
    assert server.node.stat().subscribers == 2
    for mirror in mirrors:
        await mirror.close()
    await until(lambda: server.node.stat().subscribers == 0)
    await channel.close()
    begun = time.monotonic()
    await server.stop(5)
    assert time.monotonic() - begun < 4, "mirrors do not hold up a node's end"


ITEMS = [*blocks_of(chain(12)), *blocks_of(chain(12, seed=1)), state(chain(12), 3072)]
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["put", "put", "put", "evict", "burst", "cut", "restart", "rest"]),
        st.integers(0, len(ITEMS) - 1),
        st.integers(1, 12),
    ),
    min_size=2,
    max_size=14,
)


class Cluster:
    """A node with room for some of the objects, and a mirror of it."""

    def __init__(self) -> None:
        self.config = StoreConfig(
            memory_bytes=14 * (LAYOUT.block_bytes + 600), heartbeat_s=0.05, max_event_backlog=6
        )

    async def start(self) -> None:
        self.server = await start_server(self.config)
        self.config = self.config.model_copy(update={"listen": self.server.address})
        self.client = StoreClient(self.server.address, fingerprint=FINGERPRINT, layout=LAYOUT)

    async def stop(self) -> None:
        await self.client.close()
        await self.server.stop(0)

    async def put(self, first: int, count: int) -> None:
        await self.client.put_many(ITEMS[first : first + count], owner="w", lease_ttl_s=5)
        await self.client.release("w")

    async def evict(self, first: int, _: int) -> None:
        self.server.node.evict([ITEMS[first].id], size_bytes=0, memory=True, disk=False)

    async def burst(self, first: int, count: int) -> None:
        """More changes in one step than may wait for a mirror."""
        await self.put(first, count)
        ids = [item.id for item in ITEMS]
        self.server.node.evict(ids, size_bytes=0, memory=True, disk=False)

    async def cut(self, _: int, count: int) -> None:
        """The node ends the streams of all mirrors."""
        for subscriber in list(self.server.node.feed._subscribers):
            subscriber.end()
        await asyncio.sleep(0.002 * count)

    async def restart(self, _: int, count: int) -> None:
        await self.stop()
        await asyncio.sleep(0.002 * count)
        await self.start()

    async def rest(self, _: int, count: int) -> None:
        await asyncio.sleep(0.01 * count)


def test_a_mirror_is_the_catalogue_after_any_schedule() -> None:
    counts: dict[str, int] = {}
    resyncs = 0

    @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
    @given(steps=STEPS)
    def schedule(steps: list[tuple[str, int, int]]) -> None:
        nonlocal resyncs

        async def play() -> int:
            one = Cluster()
            await one.start()
            mirror = StoreMirror([one.server.address], silence_s=1)
            mirror.start()
            try:
                for name, first, count in steps:
                    counts[name] = counts.get(name, 0) + 1
                    await getattr(one, name)(first, count)
                await until(lambda: caught_up(mirror, one.server))
                assert equal(mirror, one.server)
                assert mirror.age_s < 5
            finally:
                await mirror.close()
                await one.stop()
            return mirror.resyncs

        resyncs += asyncio.run(play())

    schedule()
    print(counts, f"{resyncs} resyncs")
    assert resyncs > 10
