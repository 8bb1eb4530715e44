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
from penstock.errors import PenstockError
from prefill.planner import Chunk

_ROUNDS_TO_GO_ON = 4
P = ParamSpec("P")
T = TypeVar("T")


class ModelThread:
    """The one thread that drives an engine. Work runs in the order of submission: the worker's
    steps one by one, between them short pieces of attaching and exporting.
    """

    def __init__(self, name: str) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
        self.pending = 0
        """Pieces of work whose callers wait."""

    async def run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Cancelling the caller takes work that has not begun out of the line."""
        self.pending += 1
        try:
            return await asyncio.wrap_future(self._executor.submit(work, *args, **kwargs))
        finally:
            self.pending -= 1

    async def let_in(self, rounds: int) -> None:
        """What waits in the line is done, and what its callers ask for next, so many times."""
        for _ in range(rounds):
            if not self.pending:
                return
            await self.run(_nothing)
            # Its callers get from one piece of work to the next in these.
            for _ in range(_ROUNDS_TO_GO_ON):
                await asyncio.sleep(0)

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
    """Owns the engine's sequence from `open` to `release` (which may be called again).

    Nothing goes to the thread before there is something to attach or to read: so a prompt that
    comes while a step runs is ready for the next one.
    """

    def __init__(self, engine: Engine, thread: ModelThread, *, capacity: int) -> None:
        self._engine = engine
        self._thread = thread
        self._capacity = capacity
        self._sequence: EngineSequence | None = None
        self._is_open = False

    async def open(self) -> None:
        self._is_open = True

    async def reset(self) -> None:
        """Back to an empty sequence at position 0."""
        await self._thread.run(self._give_back)

    async def load_blocks(self, first: int, payloads: Sequence[Buffer]) -> None:
        await self._thread.run(self._load_blocks, first, payloads)

    async def load_state(self, position: int, payload: Buffer) -> None:
        await self._thread.run(self._load_state, position, payload)

    async def replay(self, start: int) -> None:
        await self._thread.run(self._engine_replay, start)

    async def replay_some(self, tokens: Sequence[int]) -> float:
        """Read the next tokens of a replay again; seconds in the model."""
        return await self._thread.run(self._replay_some, tokens)

    async def export_blocks(self, indices: Sequence[int]) -> list[bytes]:
        return await self._thread.run(self._export_blocks, indices)

    async def export_state(self) -> bytes:
        """The state at the current position."""
        return await self._thread.run(self._export_state)

    async def release(self) -> None:
        """Runs after whatever of this sequence is still in the line."""
        await self._thread.run(self._release)

    # On the thread. Whatever is opened there is known here, so the caller may be cancelled.

    @property
    def _live(self) -> EngineSequence:
        if not self._is_open:
            raise ValueError("this sequence is not open")
        if self._sequence is None:
            self._sequence = self._engine.open(self._capacity)
        return self._sequence

    def _release(self) -> None:
        self._is_open = False
        self._give_back()

    def _give_back(self) -> None:
        if self._sequence is not None:
            sequence, self._sequence = self._sequence, None
            self._engine.release(sequence)

    def _load_blocks(self, first: int, payloads: Sequence[Buffer]) -> None:
        for offset, payload in enumerate(payloads):
            self._engine.load_block(self._live, first + offset, payload)

    def _load_state(self, position: int, payload: Buffer) -> None:
        self._engine.load_state(self._live, position, payload)

    def _engine_replay(self, start: int) -> None:
        self._engine.replay(self._live, start)

    def _replay_some(self, tokens: Sequence[int]) -> float:
        begun = time.perf_counter()
        self._engine.forward([Segment(self._live, tokens)])
        return time.perf_counter() - begun

    def _export_blocks(self, indices: Sequence[int]) -> list[bytes]:
        return [self._engine.export_block(self._live, index) for index in indices]

    def _export_state(self) -> bytes:
        return self._engine.export_state(self._live)


def compute_step(engine: Engine, work: Sequence[StepWork]) -> list[ChunkOutput | Exception]:
    """On the model thread: one forward for all of `work`, then what each of them completed.

    An error stands for work whose sequence cannot be opened; raises what the forward raises.
    """
    outputs: list[ChunkOutput | Exception] = []
    segments: list[Segment] = []
    for item in work:
        try:
            segments.append(Segment(item.sequence._live, item.tokens, item.chunk.states_at))
        except (PenstockError, ValueError) as error:
            outputs.append(error)
            continue
        outputs.append(ChunkOutput(item.chunk, (), {}, 0.0))
    begun = time.perf_counter()
    results = iter(engine.forward(segments))
    seconds = time.perf_counter() - begun
    tokens = sum(len(segment.tokens) for segment in segments)
    return [
        output
        if isinstance(output, Exception)
        else ChunkOutput(
            item.chunk,
            tuple(item.sequence._export_blocks(item.chunk.blocks)),
            next(results).states,
            seconds * len(item.tokens) / tokens,
        )
        for item, output in zip(work, outputs, strict=True)
    ]


def _nothing() -> None:
    return
