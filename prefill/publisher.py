"""Publishes a prompt's chunks while the next ones are computed.

Order: a chunk's blocks and retained states by position, each state after the blocks it needs; then
the chunk's end as the rolling state. The state at the prompt's end is the hand-over and comes last
of all, once every block of the prompt is known to be there: whoever sees it can resume.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Protocol

from kvstore.contracts import BlockStore, StoreObject
from penstock.blocks import BLOCK_TOKENS, STATE_ALIGN_TOKENS, ObjectKind
from penstock.errors import StoreUnavailableError
from penstock.identity import Chain
from penstock.telemetry import catalog as M
from penstock.telemetry.meters import NO_METER, Meter
from prefill.leases import keep_leased
from prefill.sequence import ChunkOutput

QUEUE_CHUNKS = 2
"""Chunks that wait to be published; with one more under way this bounds their memory."""
_REPAIR_ROUNDS = 3
_REPAIR_BLOCKS = 16


class Exporting(Protocol):
    """What repairing needs of a sequence that stands at the prompt's end."""

    async def export_blocks(self, indices: Sequence[int]) -> list[bytes]: ...

    async def export_state(self) -> bytes: ...


class PromptPublisher:
    """An async context: leaving it ends its work, whatever is still in the queue.

    `on_progress(position)` is called when everything up to `position` is committed.
    """

    def __init__(
        self,
        store: BlockStore,
        chain: Chain,
        *,
        owner: str,
        lease_ttl_s: float,
        on_progress: Callable[[int], Awaitable[None]],
        meter: Meter = NO_METER,
    ) -> None:
        self._store = store
        self._chain = chain
        self._owner = owner
        self._lease_ttl_s = lease_ttl_s
        self._on_progress = on_progress
        self._meter = meter
        self._queue: asyncio.Queue[ChunkOutput | None] = asyncio.Queue(QUEUE_CHUNKS)
        self._task: asyncio.Task[None] | None = None
        self._leases = AsyncExitStack()
        self._published: list[bytes] = []
        self.bytes_published = 0
        """Payload bytes that this publisher committed; what was there already does not count."""

    async def __aenter__(self) -> PromptPublisher:
        await self._leases.enter_async_context(
            keep_leased(
                self._store,
                lambda: tuple(self._published),
                owner=self._owner,
                ttl_s=self._lease_ttl_s,
            )
        )
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._leases.aclose()

    async def add(self, output: ChunkOutput | None) -> None:
        """Hand a chunk over; waits while the queue is full. Raises the failure of publishing."""
        assert self._task is not None, "the publisher has not been entered"
        putting = asyncio.create_task(self._queue.put(output))
        try:
            await asyncio.wait({putting, self._task}, return_when=asyncio.FIRST_COMPLETED)
            if self._task.done():
                self._task.result()
        finally:
            putting.cancel()

    async def settle(self) -> None:
        """Until all that was handed over so far is committed. Raises the failure of publishing."""
        assert self._task is not None, "the publisher has not been entered"
        joining = asyncio.create_task(self._queue.join())
        try:
            await asyncio.wait({joining, self._task}, return_when=asyncio.FIRST_COMPLETED)
            if self._task.done():
                self._task.result()
        finally:
            joining.cancel()

    async def keep(self, position: int, state: bytes) -> None:
        """A retained state at a multiple of 128, beside the chunks. The blocks before it are there
        already.
        """
        await self._put([self._state(position, state)])

    async def finish(self, sequence: Exporting, handover: bytes) -> None:
        """Wait for all chunks, see that every block is there, then commit the hand-over state."""
        assert self._task is not None, "the publisher has not been entered"
        await self.add(None)
        await self._task
        # Decode drops the owner's leases once it has the hand-over; no renewal may come after that.
        await self._leases.aclose()
        await self.repair_blocks(sequence, checked_by=self._owner)
        await self._put_handover(handover)

    async def repair(self, sequence: Exporting, *, checked_by: str) -> None:
        """For a prompt that was restored whole: see that its blocks and end state are there still.

        `checked_by` owns the leases that the check takes.
        """
        await self.repair_blocks(sequence, checked_by=checked_by)
        state = self._chain.state_id(len(self._chain.tokens))
        (held,) = await self._store.lease([state], owner=checked_by, ttl_s=self._lease_ttl_s)
        if not held:
            await self._put_handover(await sequence.export_state())

    async def repair_blocks(self, sequence: Exporting, *, checked_by: str) -> None:
        """Put again what the store has lost since (it may have restarted or evicted).

        Raises StoreUnavailableError if it keeps losing blocks.
        """
        blocks = self._chain.blocks
        lost: list[int] = []
        for _ in range(_REPAIR_ROUNDS):
            held = await self._store.lease(blocks, owner=checked_by, ttl_s=self._lease_ttl_s)
            lost = [index for index, there in enumerate(held) if not there]
            if not lost:
                return
            for start in range(0, len(lost), _REPAIR_BLOCKS):
                some = lost[start : start + _REPAIR_BLOCKS]
                payloads = await sequence.export_blocks(some)
                items = [self._block(i, p) for i, p in zip(some, payloads, strict=True)]
                await self._put(items)
                self._meter.add(M.PREFILL_REPAIRED, len(items))
        raise StoreUnavailableError(
            f"the KV store keeps losing blocks of this prompt ({len(lost)} of {len(blocks)})"
        )

    async def _run(self) -> None:
        while (output := await self._queue.get()) is not None:
            await self._publish(output)
            self._queue.task_done()

    async def _publish(self, output: ChunkOutput) -> None:
        chunk, end = output.chunk, output.chunk.end
        is_last = end == len(self._chain.tokens)
        items = [self._block(i, p) for i, p in zip(chunk.blocks, output.blocks, strict=True)]
        items += [
            self._state(position, output.states[position])
            for position in chunk.retained_at
            if not (is_last and position == end)
        ]
        known = await self._put(sorted(items, key=_publishing_order))
        again = sum(item.kind is ObjectKind.BLOCK for item in known)
        self._meter.add(M.PREFILL_RECOMPUTED, again * BLOCK_TOKENS)
        if is_last:
            return
        if not chunk.retained_at or chunk.retained_at[-1] != end:
            await self._put([self._state(end, output.states[end])], rolling=True)
        await self._on_progress(end)

    async def _put_handover(self, payload: bytes) -> None:
        end = len(self._chain.tokens)
        await self._put([self._state(end, payload)], rolling=end % STATE_ALIGN_TOKENS != 0)
        await self._on_progress(end)

    async def _put(self, items: list[StoreObject], *, rolling: bool = False) -> list[StoreObject]:
        """Those that the store had already."""
        if not items:
            return []
        fresh = await self._store.put_many(
            items, owner=self._owner, lease_ttl_s=self._lease_ttl_s, rolling=rolling
        )
        self.bytes_published += sum(
            len(item.payload) for item, new in zip(items, fresh, strict=True) if new
        )
        if not rolling:
            self._published += [item.id for item in items]
        return [item for item, new in zip(items, fresh, strict=True) if not new]

    def _block(self, index: int, payload: bytes) -> StoreObject:
        chain = self._chain
        return StoreObject(
            ObjectKind.BLOCK, chain.blocks[index], chain.parent(index), index, payload
        )

    def _state(self, position: int, payload: bytes) -> StoreObject:
        parent = self._chain.parent(position // BLOCK_TOKENS)
        return StoreObject(
            ObjectKind.STATE, self._chain.state_id(position), parent, position, payload
        )


def _publishing_order(item: StoreObject) -> tuple[int, bool]:
    """By the position at which an object is complete; blocks before the state that needs them."""
    is_state = item.kind is ObjectKind.STATE
    return (item.index if is_state else (item.index + 1) * BLOCK_TOKENS), is_state
