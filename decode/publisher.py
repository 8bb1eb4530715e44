"""Publishes what decode completes: each block, a rolling state, and the last state for reuse.

Never in the way of tokens: blocks stay in the engine's cache until this task asks for them, and of
the states only the newest is kept. So a slow or lost store costs neither time nor memory.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from kvstore.contracts import BlockStore, StoreObject
from penstock.blocks import BLOCK_TOKENS, ObjectKind
from penstock.errors import PenstockError
from penstock.identity import Chain

_RETRY_S = 1.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _State:
    position: int
    payload: bytes


class OutputPublisher:
    """One request's. `answer` is the list of the tokens after `prompt`, which the batch appends to;
    `attached_as` owns what the hand-over needed.
    """

    def __init__(
        self,
        store: BlockStore,
        prompt: Chain,
        answer: Sequence[int],
        *,
        owner: str,
        attached_as: str,
        lease_ttl_s: float,
        export_block: Callable[[int], Awaitable[bytes]],
        on_failure: Callable[[], None],
    ) -> None:
        length = len(prompt.tokens)
        self._store = store
        self._answer = answer
        self._owner = owner
        self._attached_as = attached_as
        self._lease_ttl_s = lease_ttl_s
        self._export_block = export_block
        self._on_failure = on_failure
        self._first = length // BLOCK_TOKENS
        self._head = prompt.tokens[self._first * BLOCK_TOKENS :]
        # parents[k] is the id of the block before block first + k.
        self._parents = [prompt.parent(self._first)]
        self._newest: _State | None = None
        self._rolled_blocks = self._first
        self._ending = False
        self._news = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._putting = asyncio.Lock()

    def start(self) -> None:
        """Begins by releasing the prompt's leases: everything of it has been attached."""
        self._task = asyncio.create_task(self._run())

    def note(self, position: int, payload: bytes) -> None:
        """The state at `position`, a multiple of 128: all tokens before it have been absorbed."""
        self._newest = _State(position, payload)
        self._news.set()

    async def finish(self) -> None:
        """Publish what is left and retain the last state. Failures are counted, not raised."""
        self._ending = True
        self._news.set()
        if self._task is not None:
            await asyncio.shield(self._task)

    async def save(self, position: int, payload: bytes) -> None:
        """Everything up to `position`, where the answer stands, and its state there as the rolling
        one. Raises the store's error.
        """
        await self._catch_up()
        async with self._putting:
            await self._put_state(_State(position, payload), rolling=True)

    async def close(self) -> None:
        """Stop at once. May be called again, also after `finish`."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        await self._try(self._store.release(self._attached_as))
        while not self._ending:
            await self._news.wait()
            self._news.clear()
            if not self._ending and not await self._try(self._catch_up()):
                await self._pause()
        await self._try(self._retain())

    async def _pause(self) -> None:
        """Before the next try; the end of the answer does not wait for it."""
        try:
            async with asyncio.timeout(_RETRY_S):
                while not self._ending:
                    await self._news.wait()
                    self._news.clear()
        except TimeoutError:
            self._news.set()

    async def _try(self, step: Awaitable[object]) -> bool:
        try:
            await step
        except PenstockError as error:
            _log.warning("publishing %s failed: %s", self._owner, error.message)
            self._on_failure()
            return False
        return True

    async def _catch_up(self) -> None:
        """All complete blocks; after each new one the newest state as the rolling one."""
        async with self._putting:
            state = self._newest
            if state is None:
                return
            blocks = state.position // BLOCK_TOKENS
            await self._put_blocks(blocks)
            if blocks > self._rolled_blocks:
                await self._put_state(state, rolling=True)
                self._rolled_blocks = blocks

    async def _retain(self) -> None:
        async with self._putting:
            state = self._newest
            if state is not None:
                await self._put_blocks(state.position // BLOCK_TOKENS)
                await self._put_state(state, rolling=False)

    async def _put_blocks(self, end: int) -> None:
        """Blocks up to index `end` (exclusive) that have not been put yet."""
        while (index := self._first + len(self._parents) - 1) < end:
            payload = await self._export_block(index)
            start = index * BLOCK_TOKENS
            (id_,) = self._chain(start, start + BLOCK_TOKENS).blocks
            item = StoreObject(ObjectKind.BLOCK, id_, self._parents[-1], index, payload)
            await self._store.put(item, owner=self._owner, lease_ttl_s=self._lease_ttl_s)
            self._parents.append(id_)

    async def _put_state(self, state: _State, *, rolling: bool) -> None:
        start = (state.position - 1) // BLOCK_TOKENS * BLOCK_TOKENS
        id_ = self._chain(start, state.position).state_id(state.position - start)
        parent = self._parents[state.position // BLOCK_TOKENS - self._first]
        item = StoreObject(ObjectKind.STATE, id_, parent, state.position, state.payload)
        await self._store.put(
            item, owner=self._owner, lease_ttl_s=self._lease_ttl_s, rolling=rolling
        )

    def _chain(self, start: int, end: int) -> Chain:
        """Ids of the tokens [start, end), `start` at a block border, without hashing the rest."""
        base = self._first * BLOCK_TOKENS
        parent = self._parents[start // BLOCK_TOKENS - self._first]
        answer_start = max(0, start - base - len(self._head))
        answer_end = max(0, end - base - len(self._head))
        tokens = (*self._head[start - base : end - base], *self._answer[answer_start:answer_end])
        return Chain(parent, (), ()).extend(tokens)
