"""One prompt from admission to hand-over, on one page."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from kvstore.contracts import BlockStore
from model.engine import Engine
from penstock import ownership
from penstock.blocks import BLOCK_TOKENS
from penstock.errors import OverloadedError, PenstockError, StoreUnavailableError
from penstock.identity import Chain
from penstock.request import Priority
from penstock.telemetry import catalog as M
from penstock.telemetry import trace
from penstock.telemetry.meters import NO_METER, Meter
from prefill.inflight import InFlight, Lead
from prefill.planner import ChunkPlan
from prefill.publisher import PromptPublisher
from prefill.restore import Restored, Restorer, Rule
from prefill.resume import Costs
from prefill.scheduler import PromptScheduler, Ticket, Wish
from prefill.sequence import ModelThread, PromptSequence
from prefill.steps import Reading, Steps

_HEAD_BYTES = 512
"""About what an object's header adds to its payload in the store."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prompt:
    """What is asked for."""

    request_id: str
    chain: Chain
    boundaries: tuple[int, ...]
    lease_ttl_s: float
    tenant: bytes = b""
    priority: Priority = Priority.NORMAL
    most_wait_s: float | None = None
    """It is refused at once if the line is predicted to take longer."""
    attempt: int = 0

    @property
    def length(self) -> int:
        return len(self.chain.tokens)

    @property
    def owner(self) -> str:
        """Owns the leases of what is published."""
        return ownership.of_prompt(self.request_id, self.attempt)

    @property
    def restore_owner(self) -> str:
        """Owns what only the restore needs; so it can be dropped when decode still needs the
        rest.
        """
        return f"{self.owner}/restore"


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
    meter: Meter = NO_METER
    open_sequences: int = 0
    in_flight: InFlight = field(default_factory=InFlight)
    costs: Costs = field(default_factory=Costs)
    steps: Steps = field(init=False)
    _cleanups: set[asyncio.Task[None]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.steps = Steps(self.engine, self.thread, self.scheduler, self.meter)

    async def run(self, prompt: Prompt, listener: Listener) -> Outcome:
        """Afterwards every block of the prompt and the state at its end are committed.

        Cancelling takes effect at the next chunk border. Raises StoreUnavailableError,
        OverloadedError and ContextLengthError; then nothing of the request is held any more.
        """
        wish = Wish(
            prompt.length,
            self.engine.bytes_for(prompt.length),
            prompt.tenant,
            prompt.priority,
            prompt.most_wait_s,
        )
        arrived = time.monotonic()
        with self.scheduler.entered(wish) as ticket:
            async with self._leases(prompt):
                await self._first(prompt, ticket)
                with self.in_flight.leading(ticket, prompt.chain.blocks) as lead:
                    return await self._work(_Visit(prompt, ticket, lead, listener, arrived))

    async def _first(self, prompt: Prompt, ticket: Ticket) -> None:
        """Until nobody else is reading what this prompt begins with."""
        try:
            async with asyncio.timeout(self.scheduler.queue_timeout_s):
                await self.in_flight.clear(ticket, prompt.chain.blocks)
        except TimeoutError as error:
            raise OverloadedError(
                "another request is reading the same prompt and did not get on in time",
                retry_after_s=self.scheduler.retry_after_s,
                reason="queue_timeout",
            ) from error

    async def settle(self) -> None:
        """Until what cancelled requests left behind has been cleaned up."""
        await asyncio.gather(*self._cleanups, return_exceptions=True)

    async def _work(self, visit: _Visit) -> Outcome:
        """Read to the end; from rest to rest, if the scheduler sends the prompt to rest."""
        prompt, outcome = visit.prompt, visit.outcome
        publisher = PromptPublisher(
            self.store,
            prompt.chain,
            owner=prompt.owner,
            lease_ttl_s=prompt.lease_ttl_s,
            on_progress=visit.progress,
            meter=self.meter,
        )
        async with publisher:
            while not await self._stay(visit, publisher):
                # What it read is committed before it comes back for it.
                visit.waited += await _seconds(publisher.settle())
        self.meter.observe(M.PUBLISH_EXPOSED_TIME, visit.waited)
        outcome.bytes_published = publisher.bytes_published
        return outcome

    async def _stay(self, visit: _Visit, publisher: PromptPublisher) -> bool:
        """From a place to its end; False if that is not yet the prompt's end."""
        prompt = visit.prompt
        async with self.scheduler.place(visit.ticket), self._sequence(prompt) as sequence:
            visit.came_in(self.meter)
            restorer = Restorer(
                self.store,
                prompt.chain,
                prompt.restore_owner,
                prompt.lease_ttl_s,
                Rule.of(self.engine.info, self.costs),
            )
            restored = await self._restored(visit, restorer, sequence)
            position = restored.position
            visit.ticket.remaining = prompt.length - position
            visit.lead.reached(position)
            if not visit.started:
                visit.started = True
                visit.outcome.cached_tokens = restored.cached
                explaining = self._apart(self._explain(restorer, restored))
                await visit.listener.started(restored.cached)
                if restored.replayed and position < prompt.length:
                    # Whoever comes next need not replay; but first it is told why this one had to.
                    await explaining
                    await publisher.keep(position, await sequence.export_state())
                if position == prompt.length:
                    await publisher.repair(sequence, checked_by=prompt.restore_owner)
                    return True
            elif position == prompt.length:
                await publisher.finish(sequence, await sequence.export_state())
                return True
            plan = await asyncio.to_thread(
                ChunkPlan,
                prompt.length,
                start=position,
                boundaries=(*prompt.boundaries, *restorer.forks(position)),
            )
            visit.lead.reads(plan)
            async with self._room(visit, position):
                return await self._read(visit, sequence, plan, publisher)

    @asynccontextmanager
    async def _room(self, visit: _Visit, position: int) -> AsyncIterator[None]:
        """While the prompt is read from `position` on, the store keeps room for what will come of
        it. Raises OverloadedError (reason `store_full`) before anything is read.
        """
        prompt, layout = visit.prompt, self.engine.info.layout

        async def pledge(done: int) -> None:
            blocks = prompt.length // BLOCK_TOKENS - done // BLOCK_TOKENS
            # The rolling state and its successor; retained ones take their chance.
            size_bytes = blocks * (layout.block_bytes + _HEAD_BYTES)
            size_bytes += 2 * (layout.state_bytes(prompt.length) + _HEAD_BYTES)
            await self.store.pledge(prompt.owner, size_bytes, ttl_s=prompt.lease_ttl_s)

        async def renew() -> None:
            while True:
                await asyncio.sleep(prompt.lease_ttl_s / 3)
                with contextlib.suppress(PenstockError):
                    # Where it went meanwhile, putting says so.
                    await pledge(max(position, visit.lead.committed))

        await pledge(position)
        renewing = asyncio.create_task(renew())
        try:
            yield
        finally:
            renewing.cancel()
            self._apart(self._unpledge(prompt))

    async def _unpledge(self, prompt: Prompt) -> None:
        with contextlib.suppress(PenstockError):
            # Its time ends it too.
            await self.store.pledge(prompt.owner, 0, ttl_s=prompt.lease_ttl_s)

    async def _restored(
        self, visit: _Visit, restorer: Restorer, sequence: PromptSequence
    ) -> Restored:
        begun = time.monotonic()
        with trace.span("restore"):
            try:
                restored = await restorer.restore(sequence)
            except StoreUnavailableError:
                if not visit.started:
                    self.meter.add(M.PREFILL_MISSED, visit.prompt.length, reason="unreachable")
                raise
            trace.note(
                restored_tokens=restored.cached,
                replayed_tokens=restored.replayed,
                way=restored.way.kind,
            )
        self.meter.observe(M.RESTORE_TIME, time.monotonic() - begun)
        self.meter.add(M.RESTORES, way=restored.way.kind)
        visit.outcome.computed_tokens += restored.replayed
        visit.outcome.compute_s += restored.replay_s
        if restored.replayed:
            self.meter.add(M.PREFILL_RECOMPUTED, restored.replayed)
        return restored

    async def _explain(self, restorer: Restorer, restored: Restored) -> None:
        try:
            reasons = await restorer.missed(restored)
        except PenstockError as error:
            _log.warning("why a prompt was not in the store is not known: %s", error.message)
            return
        for reason, missed in reasons.items():
            self.meter.add(M.PREFILL_MISSED, missed, reason=reason)

    async def _read(
        self,
        visit: _Visit,
        sequence: PromptSequence,
        plan: ChunkPlan,
        publisher: PromptPublisher,
    ) -> bool:
        """Chunk by chunk to the end; False if the prompt has to rest before."""
        outcome, handover = visit.outcome, b""
        reading = Reading(visit.ticket, sequence, visit.prompt.chain.tokens, plan)
        try:
            with trace.span("compute", tokens=plan.end - plan.position):
                while (output := await self.steps.next(reading)) is not None:
                    outcome.computed_tokens += output.chunk.end - output.chunk.start
                    outcome.compute_s += output.seconds
                    self.costs.computed(
                        output.chunk.start, output.chunk.end - output.chunk.start, output.seconds
                    )
                    handover = output.states[output.chunk.end]
                    visit.waited += await _seconds(publisher.add(output))
        finally:
            self.steps.leave(reading)
        if not plan.is_done:
            return False
        with trace.span("finish"):
            visit.waited += await _seconds(publisher.finish(sequence, handover))
        return True

    @asynccontextmanager
    async def _leases(self, prompt: Prompt) -> AsyncIterator[None]:
        """Drops what the request leased: all of it if the prompt failed, else what only the restore
        needed; decode still needs what was published and releases that itself. What failed is kept
        for a moment: another worker may go on from there.
        """
        try:
            yield
        except BaseException:
            self._apart(self._release(prompt.owner, ownership.HAND_BACK_S))
            raise
        await self._cleaned(self._release(prompt.restore_owner))

    @asynccontextmanager
    async def _sequence(self, prompt: Prompt) -> AsyncIterator[PromptSequence]:
        """An open sequence; leaving gives it back."""
        sequence = PromptSequence(self.engine, self.thread, capacity=prompt.length)
        self.open_sequences += 1
        try:
            await sequence.open()
            yield sequence
        finally:
            await self._cleaned(self._close(sequence))

    async def _cleaned(self, work: Coroutine[None, None, None]) -> None:
        """Memory counts as used until it is free, even if this task is cancelled once more."""
        await asyncio.shield(self._apart(work))

    def _apart(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._cleanups.add(task)
        task.add_done_callback(self._cleanups.discard)
        return task

    async def _close(self, sequence: PromptSequence) -> None:
        try:
            await sequence.release()
        finally:
            self.open_sequences -= 1

    async def _release(self, owner: str, after_s: float = 0.0) -> None:
        await asyncio.sleep(after_s)
        try:
            await self.store.release(owner)
        except PenstockError as error:
            # The leases' TTL does the same a little later.
            _log.warning("leases of %s were not released: %s", owner, error.message)


@dataclass
class _Visit:
    """One prompt's way through the worker."""

    prompt: Prompt
    ticket: Ticket
    lead: Lead
    listener: Listener
    arrived: float
    outcome: Outcome = field(default_factory=Outcome)
    started: bool = False
    waited: float = 0.0
    """Seconds for the store while nothing could be read."""

    def came_in(self, meter: Meter) -> None:
        if not self.started:
            waited = time.monotonic() - self.arrived
            meter.observe(M.PREFILL_QUEUE_TIME, waited)
            trace.record("queue", waited)

    async def progress(self, position: int) -> None:
        self.lead.reached(position)
        await self.listener.progress(position)


async def _seconds(work: Awaitable[None]) -> float:
    begun = time.monotonic()
    await work
    return time.monotonic() - begun
