"""One answer from credit to the last token, on one page."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from decode.admission import Admission, Credit, Need
from decode.attach import Used, attach_prompt
from decode.batch import Batch
from decode.detokenize import DecodeBytes
from decode.grammar import Constraint
from decode.output import Output
from decode.publisher import OutputPublisher
from decode.sequence import HeldSequence
from decode.stream import Drawn, Stream, Wishes
from kvstore.contracts import BlockStore
from model.engine import Engine
from penstock.errors import DeadlineError, PenstockError
from penstock.identity import Chain
from penstock.request import Priority, Sampling, StopRule
from penstock.telemetry import catalog as M
from penstock.telemetry import trace
from penstock.telemetry.meters import NO_METER, Meter

FLUSH_BEFORE_END_S = 1.0
"""How long the end of a stream waits for the answer's last blocks, so that a next turn finds
them."""
FLUSH_AFTER_END_S = 4.0
"""And how much longer they may keep the memory."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Order:
    """What is asked for. `request_id` owns the leases in the store."""

    request_id: str
    chain: Chain
    sampling: Sampling
    rule: StopRule
    wishes: Wishes
    prefill_timeout_s: float
    admission_timeout_s: float
    lease_ttl_s: float
    constraint: Constraint | None = None
    tenant: bytes = b""
    priority: Priority = Priority.NORMAL

    @property
    def prompt_tokens(self) -> int:
        return len(self.chain.tokens)

    @property
    def capacity(self) -> int:
        return self.prompt_tokens + self.rule.max_tokens


@dataclass(frozen=True)
class Listener:
    """Where news of an answer goes."""

    granted: Callable[[Need], Awaitable[None]]
    tokens: Callable[[int, list[Drawn]], Awaitable[None]]
    """Index of the first of these tokens in the answer, and the tokens."""
    finished: Callable[[str, int, str], Awaitable[None]]
    """Reason, number of tokens, text that was held back."""


@dataclass
class AnswerRunner:
    """Runs answers side by side in one batch. Belongs to one event loop."""

    engine: Engine
    batch: Batch
    store: BlockStore
    admission: Admission
    decode_bytes: DecodeBytes | None
    counters: Counter[str] = field(default_factory=Counter)
    meter: Meter = NO_METER
    open_sequences: int = 0
    _cleanups: set[asyncio.Task[None]] = field(default_factory=set)

    async def run(self, order: Order, listener: Listener) -> None:
        """Cancelling frees memory, slot and leases at once, wherever the answer stands.

        Raises ContextLengthError and OverloadedError before any event, DeadlineError and
        StoreUnavailableError while it waits for the prompt.
        """
        arrived = time.monotonic()
        need = Need(order.capacity, self.engine.bytes_for(order.capacity))
        async with (
            self.admission.reserved(
                need,
                timeout_s=order.admission_timeout_s,
                priority=order.priority,
                tenant=order.tenant,
            ) as credit,
            self._held(order) as held,
        ):
            self.meter.add(M.EVIDENCE_REQUESTS, order.wishes.evidence)
            trace.record("reserve", time.monotonic() - arrived, reserved_bytes=need.size_bytes)
            await listener.granted(need)
            with trace.span("attach", prompt_tokens=order.prompt_tokens):
                await self._attach(order, held.sequence, credit)
            stream = held.join(Output(order.rule, self.engine.info.eos_token_ids, held.text))
            index = 0
            with trace.span("generate"):
                while drawn := await stream.take():
                    await listener.tokens(index, drawn)
                    index += len(drawn)
                trace.note(tokens=index, reason=stream.reason or "")
            with trace.span("flush"):
                await held.flush()
            facts = {"answer_id": order.request_id, "tokens": index, "reason": stream.reason}
            _log.info("answer written", extra={"facts": facts})
            await listener.finished(stream.reason or "", index, stream.output.close())

    async def settle(self) -> None:
        """Until what ended requests left behind has been cleaned up."""
        await asyncio.gather(*self._cleanups, return_exceptions=True)

    async def _attach(self, order: Order, sequence: HeldSequence, credit: Credit) -> None:
        begun = time.monotonic()
        try:
            async with asyncio.timeout(order.prefill_timeout_s):
                await attach_prompt(
                    self.store,
                    order.chain,
                    Used(sequence, credit.use),
                    owner=order.request_id,
                    lease_ttl_s=order.lease_ttl_s,
                )
        except TimeoutError as error:
            raise DeadlineError(
                f"the prompt's state did not appear in the KV store within "
                f"{order.prefill_timeout_s:.0f} s: prefill is slow, failed or never began"
            ) from error
        self.meter.observe(M.ATTACH_TIME, time.monotonic() - begun)
        self.counters["decode_attached_tokens_total"] += order.prompt_tokens

    @asynccontextmanager
    async def _held(self, order: Order) -> AsyncIterator[_Held]:
        """An open sequence and what grows on it; all of it is given back at the end."""
        held = _Held(self, order)
        self.open_sequences += 1
        try:
            await held.sequence.open()
            yield held
        finally:
            cleanup = asyncio.create_task(self._clean_up(held))
            self._cleanups.add(cleanup)
            cleanup.add_done_callback(self._cleanups.discard)
            # Memory counts as used until it is free, even if this task is cancelled once more.
            await asyncio.shield(cleanup)

    async def _clean_up(self, held: _Held) -> None:
        try:
            await held.end()
        finally:
            self.open_sequences -= 1
        try:
            await self.store.release(held.order.request_id)
        except PenstockError as error:
            # The leases' TTL does the same a little later.
            _log.warning("leases of %s were not released: %s", held.order.request_id, error.message)


class _Held:
    """What one running answer holds: its sequence, its place in the batch, its publisher."""

    def __init__(self, runner: AnswerRunner, order: Order) -> None:
        self.order = order
        self.sequence = HeldSequence(runner.engine, runner.batch, capacity=order.capacity)
        self.text = runner.decode_bytes
        self._runner = runner
        self._stream: Stream | None = None
        self._publisher: OutputPublisher | None = None
        self._flushing: asyncio.Task[None] | None = None

    def join(self, output: Output) -> Stream:
        """Take part in the next step."""
        runner, order = self._runner, self.order
        answer: list[int] = []
        self._publisher = OutputPublisher(
            runner.store,
            order.chain,
            answer,
            owner=order.request_id,
            lease_ttl_s=order.lease_ttl_s,
            export_block=self.sequence.export_block,
            on_failure=self._publish_failed,
        )
        self._publisher.start()
        self._stream = Stream(
            self.sequence.live,
            order.sampling,
            output,
            order.wishes,
            self._publisher.note,
            tokens=answer,
            constraint=order.constraint,
        )
        runner.batch.join(self._stream)
        return self._stream

    async def flush(self) -> None:
        """Publish the answer's last blocks; comes back after a bounded wait, done or not."""
        if self._publisher is not None:
            self._flushing = asyncio.create_task(self._publisher.finish())
            await asyncio.wait({self._flushing}, timeout=FLUSH_BEFORE_END_S)

    async def end(self) -> None:
        """Leave the batch and give the memory back."""
        if self._stream is not None:
            self._runner.batch.leave(self._stream)
        try:
            if self._flushing is not None:
                await asyncio.wait({self._flushing}, timeout=FLUSH_AFTER_END_S)
            if self._publisher is not None:
                await self._publisher.close()
            if self._flushing is not None:
                await asyncio.gather(self._flushing, return_exceptions=True)
        finally:
            await self.sequence.release()

    def _publish_failed(self) -> None:
        self._runner.counters["decode_publish_failures_total"] += 1
