"""The continuous batch: one thread drives the engine, requests join and leave between its steps.

A turn of the thread: some pieces of other work (attach, open, export, release) for a bounded time;
then absorb the last token of each stream in one forward; then draw the next one of each. What was
drawn goes out before the next turn begins. In numerics class `exact` the company that a sequence
keeps does not change its tokens.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, ParamSpec, TypeVar

from blake3 import blake3

from decode.stream import Drawn, Stream
from model.engine import Engine, Segment
from model.sampler import sample
from penstock.errors import PenstockError, WorkerUnavailableError

WORK_SLICE_S = 0.005
"""Other work in a turn, so that attaching a long prompt does not hold up the streams."""
_DIGEST_BYTES = 8

P = ParamSpec("P")
T = TypeVar("T")
_log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Work:
    run: Callable[[], Any]
    future: asyncio.Future[Any]
    result: Any = None
    error: Exception | None = None


@dataclass
class _Turn:
    """What happened on the thread; applied on the event loop."""

    work: list[_Work] = field(default_factory=list)
    states: list[tuple[Stream, int, bytes]] = field(default_factory=list)
    drawn: list[tuple[Stream, Drawn]] = field(default_factory=list)
    failed: list[tuple[Stream, PenstockError]] = field(default_factory=list)


class Batch:
    """Belongs to one event loop. `start` once, `stop` may be called again."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="decode-model")
        self._work: deque[_Work] = deque()
        self._streams: list[Stream] = []
        self._wake = asyncio.Event()
        self._driver: asyncio.Task[None] | None = None
        self._stopping = False
        self.steps = 0
        self.generated_tokens = 0
        self.absorbed_tokens = 0
        """By how far the engine's sequences advanced in steps, as the engine itself counts."""
        self.fed_tokens = 0
        """How many of those were tokens that this worker had drawn."""

    @property
    def is_alive(self) -> bool:
        return self._driver is not None and not self._driver.done()

    def start(self) -> None:
        self._driver = asyncio.create_task(self._drive())

    async def stop(self) -> None:
        """Ends after the turn that is under way; what is left in the batch fails."""
        self._stopping = True
        self._wake.set()
        driver, self._driver = self._driver, None
        if driver is not None:
            # Not cancelled: work that the thread has taken must still be answered.
            await asyncio.gather(driver, return_exceptions=True)
        await asyncio.to_thread(self._executor.shutdown)

    def submit(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> asyncio.Future[T]:
        """Run `work` on the engine's thread between two steps, in order of submission.

        Cancelling the future takes work that has not begun out of the line.
        """
        if not self.is_alive:
            raise WorkerUnavailableError("the decode worker's batch does not run")
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._work.append(_Work(lambda: work(*args, **kwargs), future))
        self._wake.set()
        return future

    def join(self, stream: Stream) -> None:
        """From the next turn on. Its sequence must stand at a position of at least 1."""
        if not self.is_alive:
            raise WorkerUnavailableError("the decode worker's batch does not run")
        self._streams.append(stream)
        self._wake.set()

    def leave(self, stream: Stream) -> None:
        """What the turn under way draws for it is dropped. May be called again."""
        if stream in self._streams:
            self._streams.remove(stream)

    async def _drive(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while not self._stopping:
                if not self._streams and not self._work:
                    self._wake.clear()
                    await self._wake.wait()
                # Work that comes later waits for the next turn: it may release a sequence whose
                # stream has left since, but which is still in this turn's step.
                turn = await loop.run_in_executor(
                    self._executor, self._turn, tuple(self._streams), len(self._work)
                )
                self._apply(turn)
        except Exception:
            # A bug of ours: `check` shows it, and nobody may wait for a batch that has ended.
            _log.exception("the decode batch ended")
            raise
        finally:
            self._fail_all(WorkerUnavailableError("the decode worker's batch has ended"))

    def _fail_all(self, error: PenstockError) -> None:
        for stream in self._streams:
            stream.fail(error)
        self._streams.clear()
        while self._work:
            work = self._work.popleft()
            if not work.future.done():
                work.future.set_exception(error)

    # On the engine's thread

    def _turn(self, streams: tuple[Stream, ...], work_items: int) -> _Turn:
        turn = _Turn()
        self._do_work(turn, work_items)
        if streams:
            self._step(turn, streams)
        return turn

    def _do_work(self, turn: _Turn, most: int) -> None:
        until = time.perf_counter() + WORK_SLICE_S
        for _ in range(most):
            work = self._work.popleft()
            if work.future.cancelled():
                continue
            try:
                work.result = work.run()
            except Exception as error:
                # Belongs to whoever asked for it, not to the batch.
                work.error = error
            turn.work.append(work)
            if time.perf_counter() >= until:
                return

    def _step(self, turn: _Turn, streams: tuple[Stream, ...]) -> None:
        ready = [stream for stream in streams if stream.pending is None]
        stepping = [stream for stream in streams if stream.pending is not None]
        try:
            if stepping:
                before = sum(s.sequence.position for s in stepping)
                self._engine.forward(
                    [Segment(s.sequence, (s.pending,)) for s in stepping if s.pending is not None]
                )
                self.absorbed_tokens += sum(s.sequence.position for s in stepping) - before
                self.fed_tokens += len(stepping)
                ready += stepping
                turn.states += [
                    (s, s.sequence.position, self._engine.export_state(s.sequence))
                    for s in stepping
                    if s.wants_state
                ]
            logits = self._engine.logits([s.sequence for s in ready])
        except Exception as error:
            # A step is all or nothing: every sequence in it must be given up.
            _log.exception("a decode step failed")
            failure = PenstockError(f"the model failed in a decode step: {error}")
            turn.failed += [(stream, failure) for stream in streams]
            return
        for index, stream in enumerate(ready):
            try:
                turn.drawn.append((stream, self._draw(stream, logits.row(index))))
            except ValueError as error:
                turn.failed.append((stream, PenstockError(str(error))))

    def _draw(self, stream: Stream, row: memoryview) -> Drawn:
        evidence = self._engine.evidence(stream.sequence) if stream.wishes.evidence else ()
        digest = b""
        if stream.wishes.logits_digest:
            digest = blake3(row.cast("B")).digest()[:_DIGEST_BYTES]
        token = sample(
            row,
            stream.sampling,
            position=stream.sequence.position,
            forbidden=stream.output.forbidden,
        )
        return Drawn(token, evidence=tuple(evidence), digest=digest)

    # On the event loop

    def _apply(self, turn: _Turn) -> None:
        for work in turn.work:
            if work.future.done():
                continue
            if work.error is not None:
                work.future.set_exception(work.error)
            else:
                work.future.set_result(work.result)
        for stream, position, payload in turn.states:
            stream.on_state(position, payload)
        for stream, drawn in turn.drawn:
            if stream in self._streams:
                self._accept(stream, drawn)
        for stream, error in turn.failed:
            if stream in self._streams:
                self.leave(stream)
                stream.fail(error)
        self.steps += bool(turn.drawn)

    def _accept(self, stream: Stream, drawn: Drawn) -> None:
        try:
            stream.accept(drawn)
        except PenstockError as error:
            # One stream's text must not end the others.
            stream.fail(error)
        self.generated_tokens += 1
        if stream.is_over:
            self.leave(stream)
