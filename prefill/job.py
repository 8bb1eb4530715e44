"""One prompt from admission to hand-over, on one page."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from kvstore.contracts import BlockStore
from model.engine import Engine
from penstock.errors import PenstockError
from penstock.identity import Chain
from penstock.telemetry import catalog as M
from penstock.telemetry import trace
from penstock.telemetry.meters import NO_METER, Meter
from prefill.planner import plan_chunks
from prefill.publisher import PromptPublisher
from prefill.restore import Restorer
from prefill.scheduler import PromptScheduler
from prefill.sequence import ModelThread, PromptSequence

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prompt:
    """What is asked for. `request_id` owns the leases of what is published."""

    request_id: str
    chain: Chain
    boundaries: tuple[int, ...]
    lease_ttl_s: float

    @property
    def length(self) -> int:
        return len(self.chain.tokens)

    @property
    def restore_owner(self) -> str:
        """Owns what only the restore needs; so it can be dropped when decode still needs the
        rest.
        """
        return f"{self.request_id}/restore"


@dataclass(frozen=True)
class Listener:
    """Where news of a prompt goes; a listener that waits slows the prompt down, not others."""

    started: Callable[[int], Awaitable[None]]
    """Tokens restored."""
    progress: Callable[[int], Awaitable[None]]
    """Tokens ready and committed, restored ones included."""


@dataclass
class Outcome:
    """What a prompt cost."""

    cached_tokens: int = 0
    computed_tokens: int = 0
    compute_s: float = 0.0
    bytes_published: int = 0


@dataclass
class PromptRunner:
    """Runs prompts side by side on one engine. Belongs to one event loop."""

    engine: Engine
    thread: ModelThread
    store: BlockStore
    scheduler: PromptScheduler
    chunk_tokens: int
    meter: Meter = NO_METER
    open_sequences: int = 0
    _cleanups: set[asyncio.Task[None]] = field(default_factory=set)

    async def run(self, prompt: Prompt, listener: Listener) -> Outcome:
        """Afterwards every block of the prompt and the state at its end are committed.

        Cancelling takes effect at the next chunk border. Raises StoreUnavailableError,
        OverloadedError and ContextLengthError; then nothing of the request is held any more.
        """
        counted = _Remaining(self.scheduler, prompt.length)
        arrived = time.monotonic()
        try:
            async with (
                self.scheduler.admitted(self.engine.bytes_for(prompt.length)),
                self._sequence(prompt) as sequence,
            ):
                waited = time.monotonic() - arrived
                self.meter.observe(M.PREFILL_QUEUE_TIME, waited)
                trace.record("queue", waited)
                return await self._work(prompt, sequence, listener, counted)
        finally:
            counted.now(0)

    async def settle(self) -> None:
        """Until what cancelled requests left behind has been cleaned up."""
        await asyncio.gather(*self._cleanups, return_exceptions=True)

    async def _work(
        self, prompt: Prompt, sequence: PromptSequence, listener: Listener, counted: _Remaining
    ) -> Outcome:
        tokens = prompt.chain.tokens
        restorer = Restorer(self.store, prompt.chain, prompt.restore_owner, prompt.lease_ttl_s)
        begun = time.monotonic()
        with trace.span("restore"):
            position = await restorer.restore(sequence)
            trace.note(restored_tokens=position)
        self.meter.observe(M.RESTORE_TIME, time.monotonic() - begun)
        for reason, missed in restorer.missed(position).items():
            self.meter.add(M.PREFILL_MISSED, missed, reason=reason)
        outcome = Outcome(cached_tokens=position)
        counted.now(prompt.length - position)
        await listener.started(position)
        publisher = PromptPublisher(
            self.store,
            prompt.chain,
            owner=prompt.request_id,
            lease_ttl_s=prompt.lease_ttl_s,
            on_progress=listener.progress,
            meter=self.meter,
        )
        if position == prompt.length:
            await publisher.repair(sequence, checked_by=prompt.restore_owner)
            outcome.bytes_published = publisher.bytes_published
            return outcome
        chunks = await asyncio.to_thread(
            plan_chunks,
            prompt.length,
            start=position,
            chunk_tokens=self.chunk_tokens,
            boundaries=(*prompt.boundaries, *restorer.forks(position)),
        )
        handover, waited = b"", 0.0
        async with publisher:
            with trace.span("compute", tokens=prompt.length - position, chunks=len(chunks)):
                for chunk in chunks:
                    output = await sequence.compute(chunk, tokens[chunk.start : chunk.end])
                    outcome.computed_tokens += chunk.end - chunk.start
                    outcome.compute_s += output.seconds
                    self.meter.observe(M.CHUNK_TIME, output.seconds)
                    self.scheduler.measured(chunk.end - chunk.start, output.seconds)
                    counted.now(prompt.length - chunk.end)
                    handover = output.states[chunk.end]
                    waited += await _seconds(publisher.add(output))
            with trace.span("finish"):
                waited += await _seconds(publisher.finish(sequence, handover))
        self.meter.observe(M.PUBLISH_EXPOSED_TIME, waited)
        outcome.bytes_published = publisher.bytes_published
        return outcome

    @asynccontextmanager
    async def _sequence(self, prompt: Prompt) -> AsyncIterator[PromptSequence]:
        """An open sequence; leaving gives it back, and drops the leases if the prompt failed."""
        sequence = PromptSequence(self.engine, self.thread, capacity=prompt.length)
        owners = [prompt.restore_owner, prompt.request_id]
        self.open_sequences += 1
        try:
            await sequence.open()
            yield sequence
            # Decode still needs what was published; it releases the request's leases itself.
            owners = [prompt.restore_owner]
        finally:
            cleanup = asyncio.create_task(self._clean_up(sequence, owners))
            self._cleanups.add(cleanup)
            cleanup.add_done_callback(self._cleanups.discard)
            # Memory counts as used until it is free, even if this task is cancelled once more.
            await asyncio.shield(cleanup)

    async def _clean_up(self, sequence: PromptSequence, owners: list[str]) -> None:
        try:
            await sequence.release()
        finally:
            self.open_sequences -= 1
        for owner in owners:
            try:
                await self.store.release(owner)
            except PenstockError as error:
                # The leases' TTL does the same a little later.
                _log.warning("leases of %s were not released: %s", owner, error.message)


async def _seconds(work: Awaitable[None]) -> float:
    begun = time.monotonic()
    await work
    return time.monotonic() - begun


@dataclass
class _Remaining:
    """One prompt's part of the scheduler's pending tokens."""

    scheduler: PromptScheduler
    tokens: int

    def __post_init__(self) -> None:
        self.scheduler.pending_tokens += self.tokens

    def now(self, tokens: int) -> None:
        self.scheduler.pending_tokens += tokens - self.tokens
        self.tokens = tokens
