"""One answer from credit to the last token, on one page."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from decode.admission import Admission, Credit, Need
from decode.attach import Used, attach_prompt
from decode.batch import Batch
from decode.detokenize import DecodeBytes
from decode.grammar import Constraint
from decode.output import Output
from decode.publisher import OutputPublisher
from decode.room import Room
from decode.sequence import HeldSequence
from decode.stream import Drawn, Stream, Wishes
from decode.takeover import cut, replay, resume_point
from kvstore.contracts import BlockStore
from model.engine import Engine
from penstock import ownership
from penstock.errors import DeadlineError, PenstockError
from penstock.identity import Chain
from penstock.request import BEGINNING, Priority, Resume, Sampling, StopRule
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
    """What is asked for."""

    request_id: str
    chain: Chain
    """What the sequence must have absorbed before the next token is drawn."""
    prompt_tokens: int
    sampling: Sampling
    rule: StopRule
    wishes: Wishes
    prefill_timeout_s: float
    admission_timeout_s: float
    lease_ttl_s: float
    constraint: Constraint | None = None
    tenant: bytes = b""
    priority: Priority = Priority.NORMAL
    resume: Resume = BEGINNING

    @property
    def owner(self) -> str:
        """Owns what this attempt publishes."""
        return ownership.of_answer(self.request_id, self.resume.attempt)

    @property
    def attached_as(self) -> str:
        """Owns what this attempt attaches."""
        return ownership.of_attach(self.request_id, self.resume.attempt)

    @property
    def capacity(self) -> int:
        return self.prompt_tokens + self.rule.max_tokens


@dataclass(frozen=True)
class Listener:
    """Where news of an answer goes."""

    granted: Callable[[Need, bool], Awaitable[None]]
    """What is reserved, and whether prefill must run before this attempt can go on."""
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
    answer_room_tokens: int = 1024
    """Of an answer, for which there is room before anything is read; and by how much it grows."""
    open_sequences: int = 0
    _cleanups: set[asyncio.Task[None]] = field(default_factory=set)

    async def run(self, order: Order, listener: Listener) -> None:
        """Cancelling frees memory, slot and leases at once, wherever the answer stands.

        Raises ContextLengthError and OverloadedError before any event, DeadlineError and
        StoreUnavailableError while it waits for the prompt.
        """
        arrived = time.monotonic()
        bytes_for = self.engine.bytes_for
        tokens = min(order.capacity, len(order.chain.tokens) + self.answer_room_tokens)
        need = Need(tokens, bytes_for(tokens))
        async with (
            self.admission.reserved(
                need,
                timeout_s=order.admission_timeout_s,
                priority=order.priority,
                tenant=order.tenant,
                most_bytes=bytes_for(order.capacity),
            ) as credit,
            self._held(order, tokens) as held,
        ):
            self.meter.add(M.EVIDENCE_REQUESTS, order.wishes.evidence)
            trace.record("reserve", time.monotonic() - arrived, reserved_bytes=need.size_bytes)
            output = Output(order.rule, self.engine.info.eos_token_ids, held.text)
            emitted = [
                Drawn(token, text=piece.text, reason=piece.reason)
                for token, piece in zip(
                    order.resume.emitted, output.replay(order.resume.emitted), strict=False
                )
            ]
            is_over = bool(emitted) and emitted[-1].reason is not None
            start = None if is_over else await self._start(order)
            await listener.granted(need, start is None and not is_over)
            if order.resume.tell_emitted and emitted:
                await listener.tokens(0, emitted)
            index = len(emitted)
            if is_over:
                held.is_over = True
                await listener.finished(emitted[-1].reason or "", index, output.close())
                return
            with trace.span("attach", prompt_tokens=order.prompt_tokens):
                start = await self._attach(order, held.sequence, credit, start)
            stream = await held.join(output, start)
            with trace.span("generate"):
                async with held.kept(credit, stream, start):
                    while drawn := await stream.take():
                        await listener.tokens(index, drawn)
                        index += len(drawn)
                trace.note(tokens=index, reason=stream.reason or "")
            with trace.span("flush"):
                await held.flush()
            facts = {"answer_id": order.request_id, "tokens": index, "reason": stream.reason}
            _log.info("answer written", extra={"facts": facts})
            # Whoever hears of it may hang up before we hear of that.
            held.is_over = True
            await listener.finished(stream.reason or "", index, stream.output.close())

    async def settle(self) -> None:
        """Until what ended requests left behind has been cleaned up."""
        while self._cleanups:
            await asyncio.gather(*self._cleanups, return_exceptions=True)

    async def _start(self, order: Order) -> int | None:
        """From where in the store this attempt can go on without prefill; None: from nowhere."""
        if not order.resume.attempt:
            return None
        return await resume_point(
            self.store,
            order.chain,
            first=order.prompt_tokens,
            owner=order.attached_as,
            lease_ttl_s=order.lease_ttl_s,
        )

    async def _attach(
        self, order: Order, sequence: HeldSequence, credit: Credit, start: int | None
    ) -> int:
        """Until `sequence` stands at `start`, or, if that is None, where prefill brings it."""
        chain = order.chain if start is None else cut(order.chain, start)
        begun = time.monotonic()
        try:
            async with asyncio.timeout(order.prefill_timeout_s):
                await attach_prompt(
                    self.store,
                    chain,
                    Used(sequence, credit.use),
                    owner=order.attached_as,
                    lease_ttl_s=order.lease_ttl_s,
                    is_there=start is not None,
                )
        except TimeoutError as error:
            raise DeadlineError(
                f"the prompt's state did not appear in the KV store within "
                f"{order.prefill_timeout_s:.0f} s: prefill is slow, failed or never began"
            ) from error
        self.meter.observe(M.ATTACH_TIME, time.monotonic() - begun)
        self.counters["decode_attached_tokens_total"] += len(chain.tokens)
        return len(chain.tokens)

    @asynccontextmanager
    async def _held(self, order: Order, tokens: int) -> AsyncIterator[_Held]:
        """An open sequence and what grows on it; all of it is given back at the end."""
        held = _Held(self, order, tokens)
        self.open_sequences += 1
        try:
            await held.sequence.open()
            yield held
        finally:
            # The request is over with the answer's last token; else another worker may go on from
            # what this one leaves behind.
            owners, hand_back_s = [order.owner, order.attached_as], ownership.HAND_BACK_S
            if held.is_over:
                owners, hand_back_s = [order.request_id], 0.0
            # Memory counts as used until it is free, even if this task is cancelled once more.
            await asyncio.shield(self._apart(self._clean_up(held, owners, hand_back_s)))

    def _apart(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._cleanups.add(task)
        task.add_done_callback(self._cleanups.discard)
        return task

    async def _clean_up(self, held: _Held, owners: list[str], hand_back_s: float) -> None:
        try:
            await held.end()
        finally:
            self.open_sequences -= 1
            releasing = self._apart(self._release(owners, hand_back_s))
        if not hand_back_s:
            await releasing

    async def _release(self, owners: list[str], after_s: float) -> None:
        await asyncio.sleep(after_s)
        for owner in owners:
            try:
                await self.store.release(owner)
            except PenstockError as error:
                # The leases' TTL does the same a little later.
                _log.warning("leases of %s were not released: %s", owner, error.message)


class _Held:
    """What one running answer holds: its sequence, its place in the batch, its publisher."""

    def __init__(self, runner: AnswerRunner, order: Order, tokens: int) -> None:
        self.order = order
        self.sequence = HeldSequence(runner.engine, runner.batch, capacity=tokens)
        self._tokens = tokens
        self.text = runner.decode_bytes
        self.is_over = False
        """Has the answer been told to its end?"""
        self._runner = runner
        self._stream: Stream | None = None
        self._publisher: OutputPublisher | None = None
        self._flushing: asyncio.Task[None] | None = None

    async def join(self, output: Output, start: int) -> Stream:
        """Take part in the next step, after the tokens from `start` on have been fed once more."""
        runner, order = self._runner, self.order
        emitted, again = order.resume.emitted, order.chain.tokens[start:]
        # The token drawn last is not absorbed yet, and all of them come after `start`.
        answer = [*again, *emitted[-1:]]
        self._publisher = OutputPublisher(
            runner.store,
            cut(order.chain, start),
            answer,
            owner=order.owner,
            attached_as=ownership.of_handover(order.request_id),
            lease_ttl_s=order.lease_ttl_s,
            export_block=self.sequence.export_block,
            on_failure=self._publish_failed,
        )
        self._publisher.start()
        await replay(self.sequence, again, start, self._publisher.note)
        runner.counters["decode_replayed_tokens_total"] += len(again)
        self._stream = Stream(
            self.sequence.live,
            order.sampling,
            output,
            order.wishes,
            self._publisher.note,
            tokens=answer,
            constraint=order.constraint,
            emitted=emitted,
            limit=self._tokens,
        )
        runner.batch.join(self._stream)
        return self._stream

    @asynccontextmanager
    async def kept(self, credit: Credit, stream: Stream, start: int) -> AsyncIterator[None]:
        """While the answer is written its room grows, or it rests (`decode.room`)."""
        runner, order = self._runner, self.order
        assert self._publisher is not None, "the answer has not joined the batch"
        room = Room(
            runner.store,
            credit,
            cut(order.chain, start),
            order.prompt_tokens,
            runner.answer_room_tokens,
            order.capacity,
            runner.engine.bytes_for,
            self.sequence,
            stream,
            self._publisher,
            order.attached_as,
            order.lease_ttl_s,
            runner.batch.wake,
            runner.batch.settled,
            runner.counters,
        )
        keeping = asyncio.create_task(room.keep())
        try:
            yield
        finally:
            keeping.cancel()
            await asyncio.gather(keeping, return_exceptions=True)

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
