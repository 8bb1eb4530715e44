"""The continuous batch: one thread drives the engine, requests join and leave between its steps.

A turn of the thread: some pieces of other work (attach, open, export, release) for a bounded time;
then one step of all streams (`decode.step`). Whoever waits for such work is answered before the
step begins, so a prompt that has been attached takes part in it. What was drawn goes out before the
next turn. In numerics class `exact` the company that a sequence keeps does not change its tokens.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

from decode.speculation import DraftCounts
from decode.step import Outcome, Stepper
from decode.stream import Drawn, Stream
from model.engine import Engine
from penstock.errors import PenstockError, WorkerUnavailableError
from penstock.telemetry import catalog as M
from penstock.telemetry.meters import NO_METER, Meter

WORK_SLICE_S = 0.005
"""Other work in a turn, so that attaching a long prompt does not hold up the streams."""
_ROUNDS_TO_JOIN = 8
"""Of the event loop between work and step: an attached prompt's task gets from its last piece of
work to `join` in these, and nothing else waits for them."""

P = ParamSpec("P")
T = TypeVar("T")
_log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Work:
    run: Callable[[], Any]
    future: asyncio.Future[Any]
    result: Any = None
    error: Exception | None = None


class Batch:
    """Belongs to one event loop. `start` once, `stop` may be called again."""

    def __init__(self, engine: Engine, meter: Meter = NO_METER) -> None:
        self._stepper = Stepper(engine, meter)
        self._meter = meter
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="decode-model")
        self._work: deque[_Work] = deque()
        self._streams: list[Stream] = []
        self._wake = asyncio.Event()
        self._driver: asyncio.Task[None] | None = None
        self._stopping = False
        self.steps = 0
        self.generated_tokens = 0
        self.step_s = 0.0
        """Of late, on average."""
        self.drafts = DraftCounts()

    @property
    def unfed_tokens(self) -> int:
        """Tokens that the engine absorbed in steps though this worker had not drawn them."""
        return self._stepper.absorbed_tokens - self._stepper.fed_tokens

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

    def wake(self) -> None:
        """A stream can step again."""
        self._wake.set()

    def settled(self) -> asyncio.Future[None]:
        """Done when the step under way is over and what it drew has been handed out."""
        return self.submit(_nothing)

    def leave(self, stream: Stream) -> None:
        """What the turn under way draws for it is dropped. May be called again."""
        if stream in self._streams:
            self._streams.remove(stream)

    async def _drive(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while not self._stopping:
                if not self._work and not any(stream.can_step for stream in self._streams):
                    self._wake.clear()
                    await self._wake.wait()
                if self._work:
                    # Work that comes later waits for the next turn: it may release a sequence
                    # whose stream has left since.
                    count = len(self._work)
                    self._answer(await loop.run_in_executor(self._executor, self._do_work, count))
                    for _ in range(_ROUNDS_TO_JOIN):
                        await asyncio.sleep(0)
                if streams := tuple(stream for stream in self._streams if stream.can_step):
                    self._apply(await loop.run_in_executor(self._executor, self._step, streams))
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

    def _step(self, streams: tuple[Stream, ...]) -> list[Outcome]:
        begun = time.perf_counter()
        outcomes = self._stepper.step(streams)
        took_s = time.perf_counter() - begun
        self._meter.observe(M.STEP_TIME, took_s)
        self.step_s = 0.9 * self.step_s + 0.1 * took_s if self.step_s else took_s
        return outcomes

    def _do_work(self, most: int) -> list[_Work]:
        done: list[_Work] = []
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
            done.append(work)
            if time.perf_counter() >= until:
                break
        return done

    # On the event loop

    def _answer(self, done: list[_Work]) -> None:
        for work in done:
            if work.future.done():
                continue
            if work.error is not None:
                work.future.set_exception(work.error)
            else:
                work.future.set_result(work.result)

    def _apply(self, outcomes: list[Outcome]) -> None:
        for outcome in outcomes:
            self.drafts.add(len(outcome.drafts), outcome.accepted)
            if outcome.stream in self._streams:
                self._hand_out(outcome)
        drawn = sum(len(outcome.drawn) for outcome in outcomes)
        if drawn:
            self.steps += 1
            self._meter.observe(M.ITERATION_TOKENS, drawn)

    def _hand_out(self, outcome: Outcome) -> None:
        """Tokens up to the end of the answer, and the states that such an answer passes."""
        stream, accepted = outcome.stream, 0
        stream.drafts = stream.drafts.after(len(outcome.drafts), outcome.accepted)
        for drawn in outcome.drawn:
            if not stream.is_over:
                self._accept(stream, drawn)
                accepted += 1
        for position, payload in outcome.states:
            # A draft that stands behind the answer's end is no part of it.
            if position <= outcome.start + accepted:
                stream.on_state(position, payload)
        if outcome.error is not None and not stream.is_over:
            self.leave(stream)
            stream.fail(outcome.error)

    def _accept(self, stream: Stream, drawn: Drawn) -> None:
        try:
            stream.accept(drawn)
        except PenstockError as error:
            # One stream's text must not end the others.
            stream.fail(error)
        self.generated_tokens += 1
        if stream.is_over:
            self.leave(stream)


def _nothing() -> None:
    return
