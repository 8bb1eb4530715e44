"""The steps of a prefill worker: each reads parts of several prompts in one call of the engine.

While a step runs, the chunks of the one before go to the store. Between two steps prompts join,
leave and are sent to rest; in numerics class `exact` the company does not change what is read.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from model.engine import Engine
from penstock.telemetry import catalog as M
from penstock.telemetry.meters import NO_METER, Meter
from prefill.planner import ChunkPlan
from prefill.scheduler import PromptScheduler, Ticket
from prefill.sequence import ChunkOutput, ModelThread, PromptSequence, StepWork, compute_step

UNREAD_CHUNKS = 2
"""Chunks of one prompt that may wait for its task; then steps leave it out until it has come for
them.
"""
_ROUNDS_BETWEEN_STEPS = 4
"""Of attaching and exporting: enough for a prompt whose prefix is short to be attached before the
next step, too few to hold the step up.
"""
_log = logging.getLogger(__name__)


@dataclass(eq=False)
class Reading:
    """One prompt's part in the steps."""

    ticket: Ticket
    sequence: PromptSequence
    tokens: Sequence[int]
    plan: ChunkPlan
    outputs: deque[ChunkOutput] = field(default_factory=lambda: deque(maxlen=UNREAD_CHUNKS))
    error: Exception | None = None
    under_way: bool = False
    """The step that runs reads some of it."""
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def is_ready(self) -> bool:
        wants = not self.plan.is_done and self.error is None
        return wants and not self.ticket.resting and len(self.outputs) < UNREAD_CHUNKS

    def tell(self) -> None:
        self._news.set()

    async def _come(self) -> None:
        self._news.clear()
        await self._news.wait()


@dataclass
class Steps:
    """Belongs to one event loop. Runs while there is something to read."""

    engine: Engine
    thread: ModelThread
    scheduler: PromptScheduler
    meter: Meter = NO_METER
    _readings: set[Reading] = field(default_factory=set)
    _driver: asyncio.Task[None] | None = None

    async def next(self, reading: Reading) -> ChunkOutput | None:
        """The next chunk in order; None when the prompt has been read to its end or has to rest
        (`reading.plan.is_done` tells). Raises what the engine raised.

        Cancelling takes effect at the next chunk border.
        """
        self._readings.add(reading)
        reading.ticket.on_rest = reading.tell
        self._wake()
        while True:
            if reading.error is not None:
                raise reading.error
            if reading.outputs:
                output = reading.outputs.popleft()
                self._wake()
                return output
            if not reading.under_way and (reading.ticket.resting or reading.plan.is_done):
                return None
            await reading._come()

    def leave(self, reading: Reading) -> None:
        """What the step under way reads for it is dropped. May be called again."""
        self._readings.discard(reading)

    def _wake(self) -> None:
        idle = self._driver is None or self._driver.done()
        if idle and any(reading.is_ready for reading in self._readings):
            self._driver = asyncio.create_task(self._drive())

    async def _drive(self) -> None:
        try:
            while ready := [reading for reading in self._readings if reading.is_ready]:
                await self._step({reading.ticket.key: reading for reading in ready})
                # Whoever came meanwhile, and whoever ended, is seen before the next plan.
                await asyncio.sleep(0)
                await self.thread.let_in(_ROUNDS_BETWEEN_STEPS)
        except Exception as error:
            _log.exception("the steps of the prefill worker ended")
            self._fail(list(self._readings), error)

    async def _step(self, ready: dict[int, Reading]) -> None:
        plan = self.scheduler.plan([reading.ticket for reading in ready.values()])
        readings = [ready[grant.key] for grant in plan]
        work = [
            StepWork(reading.sequence, chunk, reading.tokens[chunk.start : chunk.end])
            for reading, grant in zip(readings, plan, strict=True)
            for chunk in (reading.plan.take(grant.tokens),)
        ]
        for reading in readings:
            reading.under_way = True
        try:
            outputs = await self.thread.run(compute_step, self.engine, work)
        except Exception as error:
            # All or nothing: what the engine has done to each of them is not known.
            _log.exception("a prefill step failed")
            self._fail(readings, error)
            return
        finally:
            for reading in readings:
                reading.under_way = False
        waiting = [reading.ticket for reading in self._readings]
        read, seconds = 0, 0.0
        for reading, output in zip(readings, outputs, strict=True):
            if isinstance(output, Exception):
                self._fail([reading], output)
                continue
            tokens = output.chunk.end - output.chunk.start
            read, seconds = read + tokens, seconds + output.seconds
            if reading in self._readings:
                reading.outputs.append(output)
                self.scheduler.served(reading.ticket, tokens, waiting)
                reading.tell()
        self.meter.observe(M.CHUNK_TIME, seconds)
        self.scheduler.measured(read, seconds)

    def _fail(self, readings: Sequence[Reading], error: Exception) -> None:
        for reading in readings:
            reading.error = error
            reading.tell()
