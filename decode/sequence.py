"""One request's sequence: its life on the engine's thread, from `open` to `release`."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from decode.batch import Batch
from model.engine import Buffer, Engine, Segment
from model.engine import Sequence as EngineSequence


class HeldSequence:
    """Work of one sequence runs in order; `release` may be called again."""

    def __init__(self, engine: Engine, batch: Batch, *, capacity: int) -> None:
        self._engine = engine
        self._batch = batch
        self._capacity = capacity
        self._sequence: EngineSequence | None = None

    @property
    def live(self) -> EngineSequence:
        if self._sequence is None:
            raise ValueError("this sequence is not open")
        return self._sequence

    async def open(self) -> None:
        # Cancelled or not, what the thread opened must be known here to be released.
        await asyncio.shield(self._batch.submit(self._open))

    def load_block(self, index: int, payload: Buffer) -> asyncio.Future[None]:
        return self._batch.submit(self._load_block, index, payload)

    async def load_state(self, position: int, payload: Buffer) -> None:
        await self._batch.submit(self._load_state, position, payload)

    async def absorb(self, tokens: Sequence[int], states_at: tuple[int, ...]) -> dict[int, bytes]:
        """Feed tokens that are known; the states at `states_at`, by position."""
        return await self._batch.submit(self._absorb, tokens, states_at)

    async def grow(self, capacity: int) -> None:
        await self._batch.submit(self._grow, capacity)

    async def reopen(self, capacity: int) -> None:
        """After `release`: an empty one with another capacity."""
        self._capacity = capacity
        await self.open()

    async def export_state(self) -> bytes:
        return await self._batch.submit(self._export_state)

    async def export_block(self, index: int) -> bytes:
        return await self._batch.submit(self._export_block, index)

    async def release(self) -> None:
        await asyncio.shield(self._batch.submit(self._release))

    def _open(self) -> None:
        self._sequence = self._engine.open(self._capacity)

    def _load_block(self, index: int, payload: Buffer) -> None:
        self._engine.load_block(self.live, index, payload)

    def _load_state(self, position: int, payload: Buffer) -> None:
        self._engine.load_state(self.live, position, payload)

    def _absorb(self, tokens: Sequence[int], states_at: tuple[int, ...]) -> dict[int, bytes]:
        (result,) = self._engine.forward([Segment(self.live, tokens, states_at)])
        return result.states

    def _grow(self, capacity: int) -> None:
        self._engine.grow(self.live, capacity)
        self._capacity = capacity

    def _export_state(self) -> bytes:
        return self._engine.export_state(self.live)

    def _export_block(self, index: int) -> bytes:
        return self._engine.export_block(self.live, index)

    def _release(self) -> None:
        if self._sequence is not None:
            sequence, self._sequence = self._sequence, None
            self._engine.release(sequence)
