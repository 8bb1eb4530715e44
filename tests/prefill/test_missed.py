"""Why a prefix was not restored: each reason, through a worker's own door."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Sequence

import pytest

from kvstore.contracts import Missing, StoreObject
from kvstore.fake import MemoryBlockStore
from model.fake import FakeEngine
from penstock.errors import StoreUnavailableError
from penstock.identity import Chain
from tests.decode.pair import NAMESPACE, Pair, memory_store, pair, prompt_of

REPLAY = FakeEngine().info.replay_tokens
LENGTH = 3000


class Troubled(MemoryBlockStore):
    """Slow to answer a read by `delay_s`; what is in `lost` vanishes between look-up and read."""

    delay_s = 0.0
    lost: frozenset[bytes] = frozenset()

    async def get(
        self, ids: Sequence[bytes], *, owner: str, lease_ttl_s: float, wait_s: float = 0.0
    ) -> AsyncIterator[StoreObject | Missing]:
        await asyncio.sleep(self.delay_s)
        async for item in super().get(ids, owner=owner, lease_ttl_s=lease_ttl_s, wait_s=wait_s):
            yield Missing(item.id) if item.id in self.lost else item


def troubled() -> Troubled:
    info = FakeEngine().info
    return Troubled(fingerprint=info.fingerprint, layout=info.layout)


def chain_of(tokens: Sequence[int]) -> Chain:
    return Chain.start(FakeEngine().info.fingerprint, NAMESPACE).extend(tokens)


async def told(workers: Pair, name: str = "missed_tokens", label: str = "reason") -> dict[str, int]:
    await workers.prefill.runner.settle()
    text = workers.prefill.meters.text().decode()
    series = rf'worker_(?:prefill_)?{name}_total{{[^}}]*{label}="(\w+)"[^}}]*}} (\S+)'
    found = re.findall(series, text)
    return {reason: int(float(value)) for reason, value in found if float(value)}


async def reasons(workers: Pair, tokens: Sequence[int]) -> dict[str, int]:
    """What this prompt adds; their sum is what was not cached."""
    before = await told(workers)
    got = await workers.read(tokens)
    after = await told(workers)
    grew = {reason: n - before.get(reason, 0) for reason, n in after.items()}
    assert sum(grew.values()) == len(tokens) - got.cached_tokens
    assert got.cached_tokens + got.computed_tokens == len(tokens)
    return {reason: n for reason, n in grew.items() if n}


async def drop(workers: Pair, chain: Chain, positions: Sequence[int], *, evict: bool) -> None:
    """All states but those at `positions` go, by eviction or without a trace."""
    await workers.store.release(workers.names[-1])
    node = workers.store.node  # type: ignore[attr-defined]
    gone = [chain.state_id(p) for p in range(128, len(chain.tokens) + 1, 128) if p not in positions]
    gone.append(chain.state_id(len(chain.tokens)))
    if evict:
        node.evict(gone, size_bytes=0, memory=True, disk=True)
        return
    for id_ in gone:
        node.catalogues()[0].discard(id_)
    node.stat()


async def test_never_seen_and_the_rest_of_a_block() -> None:
    async with pair() as workers:
        tokens = prompt_of(LENGTH)
        assert await reasons(workers, tokens) == {"new": LENGTH}
        assert await reasons(workers, tokens[:2760]) == {"tail": 2760 - 2560}
        assert await reasons(workers, [*tokens, *prompt_of(300, 5)]) == {"new": 356}


async def test_evicted_blocks_and_states_are_remembered() -> None:
    async with pair() as workers:
        tokens = prompt_of(LENGTH)
        chain = chain_of(tokens)
        await workers.read(tokens)
        await drop(workers, chain, [1024], evict=True)
        workers.store.node.evict(  # type: ignore[attr-defined]
            list(chain.blocks[8:]), size_bytes=0, memory=True, disk=True
        )
        # Blocks up to 2048 are there: it is replayed, for the state there was evicted too.
        assert await reasons(workers, tokens) == {
            "evicted": REPLAY + 3 * 256,
            "new": LENGTH - 11 * 256,
        }


async def test_blocks_without_a_state_are_replayed() -> None:
    async with pair() as workers:
        tokens = prompt_of(LENGTH)
        await workers.read(tokens)
        await drop(workers, chain_of(tokens), [512], evict=False)
        assert await reasons(workers, tokens) == {"no_state": REPLAY, "tail": LENGTH - 11 * 256}
        assert (await told(workers, "restores", "way"))["replay"] == 1
        # The state that the replay ended with was kept: nobody replays it again.
        assert await reasons(workers, tokens[:2900]) == {"tail": 2900 - 11 * 256}


async def test_blocks_without_a_state_and_too_few_to_replay() -> None:
    async with pair() as workers:
        tokens = prompt_of(200)
        whole = [*tokens, *prompt_of(60, 3)]
        await workers.read(whole)
        await drop(workers, chain_of(whole), [], evict=False)
        # One block: a replay would have to begin at 128 and is offered; less would not be.
        assert await reasons(workers, whole) == {"no_state": 128, "tail": 4}


async def test_lost_between_look_up_and_attach() -> None:
    store = troubled()
    async with pair(store=store) as workers:
        tokens = prompt_of(LENGTH)
        chain = chain_of(tokens)
        await workers.read(tokens)
        store.lost = frozenset([chain.blocks[5]])
        missed = await reasons(workers, tokens)
        assert missed["lost"] > 1000


async def test_what_does_not_verify_is_told_apart() -> None:
    store = troubled()
    async with pair(store=store) as workers:
        tokens = prompt_of(LENGTH)
        await workers.read(tokens)
        damaged = chain_of(tokens).blocks[5]
        memory = store.node._memory
        spoilt = bytearray(memory.read(damaged))
        spoilt[-1] ^= 1
        memory.store(damaged, spoilt)
        missed = await reasons(workers, tokens)
        assert "lost" not in missed
        assert missed["damaged"] > 1000
        assert (await store.stat()).integrity_failures == 0
        assert store.integrity_failures >= 1


async def test_computing_was_predicted_to_be_faster() -> None:
    store = troubled()
    async with pair(store=store) as workers:
        tokens = prompt_of(LENGTH)
        await workers.read(tokens)
        store.delay_s = 0.8
        for _ in range(20):
            if "cheaper" in (missed := await reasons(workers, tokens)):
                break
        assert missed == {"cheaper": LENGTH}, "the store was slow and yet asked every time"
        text = workers.prefill.meters.text().decode()
        (latency,) = re.findall(r"worker_resume_fetch_latency_seconds{[^}]*} (\S+)", text)
        assert float(latency) > 0.1


async def test_a_store_that_cannot_be_reached() -> None:
    store = troubled()
    async with pair(store=store) as workers:
        store.reachable = False
        with pytest.raises(StoreUnavailableError):
            await workers.read(prompt_of(LENGTH))
        assert await told(workers) == {"unreachable": LENGTH}


async def test_a_way_of_each_kind_is_counted() -> None:
    async with pair(store=memory_store(FakeEngine())) as workers:
        tokens = prompt_of(LENGTH)
        await workers.read(tokens)
        await workers.read(tokens)
        assert await told(workers, "restores", "way") == {"nothing": 1, "state": 1}
