"""Finds and attaches the longest prefix of a prompt that the store can resume.

Resumable at c: the state at c is there and so are all blocks before it. Whatever turns out to be
missing on the way (evicted, damaged, never there) only makes the prefix shorter.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Protocol

from kvstore.contracts import BlockStore, Buffer, Missing, StoreObject
from penstock.blocks import BLOCK_TOKENS
from penstock.identity import Chain
from prefill.leases import keep_leased
from prefill.planner import best_resume, resume_candidates

IDS_PER_LOOKUP = 32_768
BATCH_BYTES = 16 << 20
"""Payload attached in one piece of work on the model thread: it must stay short beside chunks."""
_ROUNDS = 8


class Attachable(Protocol):
    """What `restore` needs of a sequence."""

    async def reset(self) -> None: ...

    async def load_blocks(self, first: int, payloads: Sequence[Buffer]) -> None: ...

    async def load_state(self, position: int, payload: Buffer) -> None: ...


@dataclass
class Restorer:
    """One prompt's restore. `owner` holds the leases; its releases are the caller's."""

    store: BlockStore
    chain: Chain
    owner: str
    lease_ttl_s: float
    _unusable: set[bytes] = field(default_factory=set)
    _planned: int = 0
    """Where the first lookup said that the prompt could be resumed."""
    _blocks_there: int = 0
    """Blocks from the prompt's start on that the first lookup found."""

    async def restore(self, sequence: Attachable) -> int:
        """Position at which `sequence` stands afterwards: 0 (empty) to the prompt's length.

        Raises StoreUnavailableError if the store cannot be asked.
        """
        for attempt in range(_ROUNDS):
            position = await self._look_up()
            if not attempt:
                self._planned = position
            if not position:
                return 0
            if await self._attach(sequence, position):
                return position
            await sequence.reset()
        return 0

    def missed(self, position: int) -> dict[str, int]:
        """Tokens after `position`, where `restore` came to stand, by the reason why they were not
        restored (`catalog.PREFILL_MISSED`). Their sum is the rest of the prompt.
        """
        length = len(self.chain.tokens)
        whole = len(self.chain.blocks) * BLOCK_TOKENS
        there = self._blocks_there * BLOCK_TOKENS
        planned = max(position, self._planned)
        covered = max(planned, there)
        reasons = {"lost": planned - position, "no_state": covered - planned}
        reasons["tail" if covered >= whole else "new"] = length - covered
        return {reason: tokens for reason, tokens in reasons.items() if tokens}

    def forks(self, position: int) -> tuple[int, ...]:
        """Where this prompt leaves one that was computed before, if it was not resumed so far: a
        state there lets the next prompt with that beginning resume at it.
        """
        end = self._blocks_there
        return (
            (end * BLOCK_TOKENS,) if position // BLOCK_TOKENS < end < len(self.chain.blocks) else ()
        )

    async def _look_up(self) -> int:
        candidates = resume_candidates(len(self.chain.tokens))
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
        if not self._unusable:
            self._blocks_there = next((i for i in range(blocks) if not usable[i]), blocks)
        return best_resume(
            candidates, states_present=usable[blocks:], blocks_present=usable[:blocks]
        )

    async def _attach(self, sequence: Attachable, position: int) -> bool:
        """False if something was missing; the sequence may then hold a part."""
        blocks = self.chain.blocks[: position // BLOCK_TOKENS]
        # The state first: it is the piece most likely to have gone, and it is small.
        ids = [self.chain.state_id(position), *blocks]
        fetching = self.store.get(ids, owner=self.owner, lease_ttl_s=self.lease_ttl_s)
        async with (
            keep_leased(self.store, lambda: ids, owner=self.owner, ttl_s=self.lease_ttl_s),
            closing_iterator(fetching) as objects,
        ):
            state = await anext(objects)
            if isinstance(state, Missing):
                self._unusable.add(state.id)
                return False
            if not await self._attach_blocks(sequence, objects):
                return False
        await sequence.load_state(position, state.payload)
        return True

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
                    self._unusable.add(item.id)
                    return False
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
