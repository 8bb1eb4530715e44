"""Kept streams, on every backend: one writer, no gap, nobody else's, gone in time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.journal.streams import RUNNING_TTL_S, StreamFacts, StreamJournal
from kvstore.journal.tables import Backend, MemoryBackend
from penstock.errors import ConflictError, JournalUnavailableError, NotFoundError
from tests.kvstore.journal.test_journal import Clock, make_of
from tests.kvstore.redis_server import running_redis

FACTS = StreamFacts("cmpl-1", 1_000, 77, "d1")
Make = Callable[[], Backend]


@pytest.fixture(scope="module")
def shared_redis():  # type: ignore[no-untyped-def]
    with running_redis() as server:
        yield server


@pytest.fixture(params=["fake", "sqlite", "redis"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Make:
    return make_of(request.param, tmp_path, request)


def journal(make: Make, clock: Clock | None = None, most_bytes: int = 1 << 20) -> StreamJournal:
    return StreamJournal(make(), ttl_s=100.0, most_bytes=most_bytes, clock=clock or Clock())


def test_another_front_finds_the_tokens_and_the_first_one_has_lost_the_stream(make: Make) -> None:
    async def run() -> None:
        first, second = journal(make), journal(make)
        writer = await first.open("acme", "r1", FACTS)
        writer.read(128)
        for token in range(100):
            writer.add([token])
            if token % 30 == 0:
                await first.flushed()
        await first.flushed()
        held, taken = await second.take_over("acme", "r1", "d1")
        assert (held.facts, held.tokens, held.cached_tokens) == (FACTS, tuple(range(100)), 128)
        assert taken.fence > writer.fence
        writer.add([500])
        taken.add([100, 101])
        await first.flushed()
        await second.flushed()
        assert writer.is_lost and not taken.is_lost
        held, _ = await second.take_over("acme", "r1", "d1")
        assert held.tokens == (*range(100), 100, 101)
        await first.close()
        await second.close()

    asyncio.run(run())


def test_a_stream_is_its_tenants_its_requests_and_ends_in_time(make: Make) -> None:
    async def run() -> None:
        clock = Clock()
        one = journal(make, clock)
        writer = await one.open("acme", "r1", FACTS)
        for tenant, name in (("other", "r1"), ("acme", "r2")):
            with pytest.raises(NotFoundError):
                await one.take_over(tenant, name, "d1")
        with pytest.raises(ConflictError):
            await one.take_over("acme", "r1", "d2")
        writer.add([1, 2])
        writer.end()
        await one.flushed()
        clock.now_s += 99
        await one.take_over("acme", "r1", "d1")
        clock.now_s += RUNNING_TTL_S + 1
        with pytest.raises(NotFoundError):
            await one.take_over("acme", "r1", "d1")
        # The next streams forget what has expired.
        await one.open("acme", "r3", FACTS)
        rows = await asyncio.to_thread(make().transact, lambda tx: tx.rows(b"t/") + tx.rows(b"s/"))
        assert len(rows) == 1
        await one.close()

    asyncio.run(run())


def test_beyond_the_budget_a_stream_is_kept_no_further_but_without_a_gap() -> None:
    async def run() -> None:
        shared = MemoryBackend()
        one = journal(lambda: shared, most_bytes=40)
        writer = await one.open("acme", "r1", FACTS)
        for start in range(0, 30, 6):
            writer.add(range(start, start + 6))
            await one.flushed()
        held, _ = await one.take_over("acme", "r1", "d1")
        assert held.tokens == tuple(range(6))
        await one.close()

    asyncio.run(run())


class Flaky(MemoryBackend):
    """Fails, before or after the commit, when told."""

    def __init__(self) -> None:
        super().__init__()
        self.faults: list[str] = []

    def transact(self, work, *, read_only: bool = False):  # type: ignore[no-untyped-def]
        fault = self.faults.pop() if self.faults else ""
        if fault == "before":
            raise JournalUnavailableError("away")
        result = super().transact(work, read_only=read_only)
        if fault == "after":
            raise JournalUnavailableError("was it written?")
        return result


@settings(max_examples=25, deadline=None)
@given(
    pieces=st.lists(st.lists(st.integers(0, 2**32 - 1), max_size=5), max_size=8),
    faults=st.lists(st.sampled_from(["", "before", "after"]), max_size=6),
)
def test_faults_of_the_backend_lose_repeat_and_reorder_nothing(
    pieces: list[list[int]], faults: list[str]
) -> None:
    async def run() -> None:
        backend = Flaky()
        one = StreamJournal(backend, ttl_s=100.0, most_bytes=1 << 20)
        writer = await one.open("acme", "r1", FACTS)
        backend.faults = list(faults)
        for piece in pieces:
            writer.add(piece)
            await asyncio.sleep(0)
        await one.flushed()
        backend.faults = []
        held, _ = await one.take_over("acme", "r1", "d1")
        assert list(held.tokens) == [token for piece in pieces for token in piece]
        await one.close()

    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:
        patch.setattr("kvstore.journal.streams.COALESCE_S", 0.0)
        patch.setattr("kvstore.journal.streams._RETRY_S", 0.0)
        asyncio.run(run())
