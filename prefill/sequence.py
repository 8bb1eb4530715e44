"""One prompt's sequence on the model thread: everything that touches the engine goes through it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

from model.engine import Buffer, Engine, Segment
from model.engine import Sequence as EngineSequence
from prefill.planner import Chunk

P = ParamSpec("P")
T = TypeVar("T")


class ModelThread:
    """The one thread that drives an engine. Work runs in the order of submission: the worker's
    steps one by one, between them short pieces of attaching and exporting.
    """

    def __init__(self, name: str) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)

    async def run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Cancelling the caller takes work that has not begun out of the line."""
        return await asyncio.wrap_future(self._executor.submit(work, *args, **kwargs))

    async def close(self) -> None:
        """Ends the thread after what is in the line. May be called again."""
        await asyncio.to_thread(self._executor.shutdown)


@dataclass(frozen=True)
class ChunkOutput:
    """What one chunk gave: payloads of its blocks (in order) and of its states by position."""

    chunk: Chunk
    blocks: tuple[bytes, ...]
    states: dict[int, bytes]
    seconds: float
    """Its share of the step's time in the model, by tokens."""


@dataclass(frozen=True)
class StepWork:
    """What one step reads of one prompt."""

    sequence: PromptSequence
    chunk: Chunk
    tokens: Sequence[int]


class PromptSequence:
    """Owns the engine's sequence from `open` to `release` (which may be called again)."""

    def __init__(self, engine: Engine, thread: ModelThread, *, capacity: int) -> None:
        self._engine = engine
        self._thread = thread
        self._capacity = capacity
        self._sequence: EngineSequence | None = None

    async def open(self) -> None:
        # Cancelled or not, what the thread opened must be known here to be released.
        await asyncio.shield(self._thread.run(self._open))

    async def reset(self) -> None:
        """Back to an empty sequence at position 0."""
        await asyncio.shield(self._thread.run(self._reopen))

    async def load_blocks(self, first: int, payloads: Sequence[Buffer]) -> None:
        await self._thread.run(self._load_blocks, first, payloads)

    async def load_state(self, position: int, payload: Buffer) -> None:
        await self._thread.run(self._load_state, position, payload)

    async def export_blocks(self, indices: Sequence[int]) -> list[bytes]:
        return await self._thread.run(self._export_blocks, indices)

    async def export_state(self) -> bytes:
        """The state at the current position."""
        return await self._thread.run(self._export_state)

    async def release(self) -> None:
        """Runs after whatever of this sequence is still in the line."""
        await self._thread.run(self._release)

    @property
    def _live(self) -> EngineSequence:
        if self._sequence is None:
            raise ValueError("this sequence is not open")
        return self._sequence

    def _open(self) -> None:
        self._sequence = self._engine.open(self._capacity)

    def _release(self) -> None:
        if self._sequence is not None:
            sequence, self._sequence = self._sequence, None
            self._engine.release(sequence)

    def _reopen(self) -> None:
        self._release()
        self._open()

    def _load_blocks(self, first: int, payloads: Sequence[Buffer]) -> None:
        for offset, payload in enumerate(payloads):
            self._engine.load_block(self._live, first + offset, payload)

    def _load_state(self, position: int, payload: Buffer) -> None:
        self._engine.load_state(self._live, position, payload)

    def _export_blocks(self, indices: Sequence[int]) -> list[bytes]:
        return [self._engine.export_block(self._live, index) for index in indices]

    def _export_state(self) -> bytes:
        return self._engine.export_state(self._live)


def compute_step(engine: Engine, work: Sequence[StepWork]) -> list[ChunkOutput]:
    """On the model thread: one forward for all of `work`, then what each of them completed."""
    begun = time.perf_counter()
    results = engine.forward(
        [Segment(item.sequence._live, item.tokens, item.chunk.states_at) for item in work]
    )
    seconds = time.perf_counter() - begun
    tokens = sum(len(item.tokens) for item in work)
    return [
        ChunkOutput(
            item.chunk,
            tuple(item.sequence._export_blocks(item.chunk.blocks)),
            result.states,
            seconds * len(item.tokens) / tokens,
        )
        for item, result in zip(work, results, strict=True)
    ]
