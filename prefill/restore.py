"""Finds and attaches what the store has of a prompt, by the cheapest way (`prefill.resume`).

Resumable at c: all blocks before it are there, and so is the state at c or the engine replays it.
Whatever turns out to be missing on the way (evicted, damaged, never there) only makes the prefix
shorter.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Protocol

from kvstore.contracts import BlockStore, Buffer, Missing, StoreObject
from model.engine import EngineInfo
from penstock.blocks import BLOCK_TOKENS, CacheLayout
from penstock.identity import Chain
from prefill.leases import keep_leased
from prefill.planner import resume_candidates
from prefill.resume import NOTHING, Choice, Costs, Kind, Way, choose, ways

IDS_PER_LOOKUP = 32_768
BATCH_BYTES = 16 << 20
"""Payload attached in one piece of work on the model thread: it must stay short beside chunks."""
REPLAY_PIECE_TOKENS = 512
"""Likewise, of a replay."""
_ROUNDS = 8


class Attachable(Protocol):
    """What `restore` needs of a sequence."""

    async def reset(self) -> None: ...

    async def load_blocks(self, first: int, payloads: Sequence[Buffer]) -> None: ...

    async def load_state(self, position: int, payload: Buffer) -> None: ...

    async def replay(self, start: int) -> None: ...

    async def replay_some(self, tokens: Sequence[int]) -> float: ...


@dataclass(frozen=True)
class Rule:
    """What the choice depends on beside the prompt. `costs` are the worker's, and learn here."""

    layout: CacheLayout
    replay_tokens: int = 0
    costs: Costs = field(default_factory=Costs)

    @classmethod
    def of(cls, info: EngineInfo, costs: Costs) -> Rule:
        return cls(info.layout, info.replay_tokens, costs)


@dataclass(frozen=True)
class Restored:
    """Where the sequence stands, and what of that was computed again."""

    way: Way = NOTHING
    replay_s: float = 0.0

    @property
    def position(self) -> int:
        return self.way.position

    @property
    def cached(self) -> int:
        """Tokens that were not computed."""
        return self.way.start

    @property
    def replayed(self) -> int:
        return self.way.replayed


@dataclass
class Restorer:
    """One prompt's restore. `owner` holds the leases; its releases are the caller's."""

    store: BlockStore
    chain: Chain
    owner: str
    lease_ttl_s: float
    rule: Rule
    choice: Choice | None = None
    """What the first look-up led to."""
    _unusable: set[bytes] = field(default_factory=set)
    _damaged: bool = False
    _blocks_there: int = 0
    """Blocks from the prompt's start on that the first look-up found."""

    async def restore(self, sequence: Attachable) -> Restored:
        """Leaves `sequence` at the result's position: 0 (empty) to the prompt's length.

        Raises StoreUnavailableError if the store cannot be asked.
        """
        for _ in range(_ROUNDS):
            choice = await self._look_up()
            if self.choice is None:
                self.choice = choice
                if choice.way != choice.longest:
                    # Not tried now, so nothing is learnt of it: the next ones may.
                    self.rule.costs.fetch.forget()
            way = choice.way
            if way.kind is Kind.NOTHING:
                return Restored()
            if await self._attach(sequence, way):
                return Restored(way, await self._replay(sequence, way))
            await sequence.reset()
        return Restored()

    async def missed(self, restored: Restored) -> dict[str, int]:
        """Tokens that were not restored, by the reason why (`catalog.PREFILL_MISSED`). Their sum is
        the rest of the prompt. Asks the store what it evicted.
        """
        length, chain, choice = len(self.chain.tokens), self.chain, self.choice
        assert choice is not None, "nothing has been restored yet"
        planned = max(choice.way.start, restored.cached)
        possible = max(choice.longest.start, planned)
        there = max(self._blocks_there * BLOCK_TOKENS, possible)
        whole = len(chain.blocks) * BLOCK_TOKENS
        reasons = {
            "damaged" if self._damaged else "lost": planned - restored.cached,
            "cheaper": possible - planned,
        }
        places = [c for c in resume_candidates(length) if possible < c <= there]
        blocks = chain.blocks[there // BLOCK_TOKENS :] if there < whole else ()
        gone = await self._evicted([*(chain.state_id(c) for c in places), *blocks])
        states = [c for c, was_here in zip(places, gone, strict=False) if was_here]
        resumable = max(states, default=possible)
        lost_blocks = sum(gone[len(places) :]) * BLOCK_TOKENS
        reasons["evicted"] = resumable - possible + lost_blocks
        reasons["no_state"] = there - resumable
        reasons["tail" if there >= whole else "new"] = length - there - lost_blocks
        return {reason: tokens for reason, tokens in reasons.items() if tokens}

    def forks(self, position: int) -> tuple[int, ...]:
        """Where this prompt leaves one that was computed before, if it was not resumed so far: a
        state there lets the next prompt with that beginning resume at it.
        """
        end = self._blocks_there
        return (
            (end * BLOCK_TOKENS,) if position // BLOCK_TOKENS < end < len(self.chain.blocks) else ()
        )

    async def _evicted(self, ids: Sequence[bytes]) -> list[bool]:
        return await self.store.evicted(ids[:IDS_PER_LOOKUP]) if ids else []

    async def _look_up(self) -> Choice:
        length = len(self.chain.tokens)
        candidates = resume_candidates(length)
        # Hashing thousands of tails takes tens of ms at a million tokens.
        states = await asyncio.to_thread(lambda: [self.chain.state_id(c) for c in candidates])
        ids = [*self.chain.blocks, *states]
        present: list[bool] = []
        for start in range(0, len(ids), IDS_PER_LOOKUP):
            present += await self.store.has(ids[start : start + IDS_PER_LOOKUP])
        usable = [
            there and id_ not in self._unusable for id_, there in zip(ids, present, strict=True)
        ]
        blocks = len(self.chain.blocks)
        prefix = next((i for i in range(blocks) if not usable[i]), blocks)
        if not self._unusable:
            self._blocks_there = prefix
        rule = self.rule
        found = ways(
            length,
            [c for c, there in zip(candidates, usable[blocks:], strict=True) if there],
            blocks=prefix,
            layout=rule.layout,
            replay_tokens=rule.replay_tokens,
        )
        return choose(found, rule.costs, length)

    async def _replay(self, sequence: Attachable, way: Way) -> float:
        """Seconds in the model."""
        if way.kind is not Kind.REPLAY:
            return 0.0
        await sequence.replay(way.start)
        total = 0.0
        for start in range(way.start, way.position, REPLAY_PIECE_TOKENS):
            end = min(start + REPLAY_PIECE_TOKENS, way.position)
            seconds = await sequence.replay_some(self.chain.tokens[start:end])
            self.rule.costs.computed(start, end - start, seconds)
            total += seconds
        return total

    async def _attach(self, sequence: Attachable, way: Way) -> bool:
        """False if something was missing; the sequence may then hold a part."""
        blocks = self.chain.blocks[: way.position // BLOCK_TOKENS]
        # The state first: it is the piece most likely to have gone, and it is small.
        states = [self.chain.state_id(way.position)] if way.kind is Kind.STATE else []
        ids = [*states, *blocks]
        begun = time.monotonic()
        fetching = self.store.get(ids, owner=self.owner, lease_ttl_s=self.lease_ttl_s)
        async with (
            keep_leased(self.store, lambda: ids, owner=self.owner, ttl_s=self.lease_ttl_s),
            closing_iterator(fetching) as objects,
        ):
            state: StoreObject | None = None
            if states:
                first = await anext(objects)
                if isinstance(first, Missing):
                    return self._without(first)
                state = first
            if not await self._attach_blocks(sequence, objects):
                return False
        if state is not None:
            await sequence.load_state(way.position, state.payload)
        self.rule.costs.fetched(way.fetch_bytes, time.monotonic() - begun)
        return True

    def _without(self, missing: Missing) -> bool:
        self._unusable.add(missing.id)
        self._damaged |= missing.damaged
        return False

    async def _attach_blocks(
        self, sequence: Attachable, objects: AsyncIterator[StoreObject | Missing]
    ) -> bool:
        """Attach while the next objects are on their way, at most two batches in memory."""
        batch: list[Buffer] = []
        size_bytes, first = 0, 0
        attaching: asyncio.Task[None] | None = None
        try:
            async for item in objects:
                if isinstance(item, Missing):
                    return self._without(item)
                batch.append(item.payload)
                size_bytes += len(item.payload)
                if size_bytes >= BATCH_BYTES:
                    if attaching is not None:
                        await attaching
                    attaching = asyncio.create_task(sequence.load_blocks(first, batch))
                    first += len(batch)
                    batch, size_bytes = [], 0
            if attaching is not None:
                await attaching
            if batch:
                await sequence.load_blocks(first, batch)
            return True
        finally:
            if attaching is not None and not attaching.done():
                attaching.cancel()
                await asyncio.gather(attaching, return_exceptions=True)


@asynccontextmanager
async def closing_iterator(
    objects: AsyncIterator[StoreObject | Missing],
) -> AsyncIterator[AsyncIterator[StoreObject | Missing]]:
    """Closing the iterator stops the transfer (`BlockStore.get`)."""
    try:
        yield objects
    finally:
        if isinstance(objects, AsyncGenerator):
            await objects.aclose()
