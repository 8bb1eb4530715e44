"""`FakeService`: the `Service` contract in one process over the fake engine. No workers, no gRPC.

For tests of the API and for client development. It has faults and pauses to order.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass

from cluster.contracts import Readiness, ServedModel, WorkerView
from cluster.policy import NOTHING, Shape
from cluster.routing.board import Board
from cluster.routing.cost import CostPolicy
from cluster.routing.told import Decisions, Told
from decode.evidence import of_prompt
from decode.grammar import LlGrammars
from decode.output import Output
from decode.step import Stepper
from decode.stream import Drawn, Stream, Wishes
from model.engine import Segment
from model.engine import Sequence as EngineSequence
from model.fake import EOS, VOCAB, FakeEngine, FakeSettings
from penstock.errors import PenstockError
from penstock.request import (
    Event,
    EvidenceSpan,
    Finish,
    Progress,
    Request,
    TokenChunk,
    Usage,
)
from penstock.telemetry.workers import worker_meters
from penstock.tokenizer import ByteTokenizer

_CHUNK_TOKENS = 2048


@dataclass
class FakePlan:
    """What the next requests meet. Change it between requests."""

    refuse: PenstockError | None = None
    """Raised before the first event."""
    fail_after_tokens: int | None = None
    break_after_tokens: int | None = None
    """As `fail_after_tokens`, with an error that nobody expects."""
    prefill_pause_s: float = 0.0
    """Before each chunk of the prompt."""
    token_pause_s: float = 0.0
    close_pause_s: float = 0.0
    """After the last event, as a cluster needs time to cancel its calls."""
    cached_tokens: int = 0
    answer: Sequence[tuple[int, str]] | None = None
    """Said instead of what the fake engine would: each token with the text that it shows. Ends with
    `stop`, or with `length` if `max_tokens` comes first."""
    answer_evidence: Sequence[tuple[int, int, float]] = ()
    """Of every token of `answer`: start, end, mass."""
    ready: bool = True


class FakeService:
    """Counts what it opened and closed, so that leaks show."""

    def __init__(self, *, max_model_len: int = 1 << 20, name: str = "fake") -> None:
        self._engine = FakeEngine(FakeSettings(max_model_len=max_model_len))
        self._stepper = Stepper(self._engine)
        self._grammars = LlGrammars(ByteTokenizer(), vocab_size=VOCAB, eos=frozenset({EOS}))
        self._name = name
        self._created = int(time.time())
        self.plan = FakePlan()
        self.opened = 0
        self.closed = 0
        self.requests: list[Request] = []
        """The latest ones, at most 64."""
        self._decisions = Decisions()

    async def model(self) -> ServedModel:
        info = self._engine.info
        return ServedModel(self._name, self._created, info.max_model_len, info.fingerprint.hex())

    async def generate(self, request: Request) -> AsyncIterator[Event]:
        self.opened += 1
        self.requests = [*self.requests[-63:], request]
        await self._decide(request)
        sequence = self._engine.open(request.total_tokens)
        try:
            if self.plan.refuse is not None:
                raise self.plan.refuse
            total = len(request.token_ids)
            cached = min(self.plan.cached_tokens, total - 1)
            for start in range(0, total, _CHUNK_TOKENS):
                await asyncio.sleep(self.plan.prefill_pause_s)
                chunk = request.token_ids[start : start + _CHUNK_TOKENS]
                if self.plan.answer is None:
                    self._engine.forward([Segment(sequence, chunk)])
                yield Progress(start + len(chunk), total, cached)
            if self.plan.answer is not None:
                for event in self._scripted(self.plan, request, cached):
                    await asyncio.sleep(self.plan.token_pause_s)
                    yield event
                return
            stream = _stream_of(request, sequence)
            if request.grammar is not None:
                stream.constraint = self._grammars.open(request.grammar)
            index = 0
            while stream.reason is None:
                await asyncio.sleep(self.plan.token_pause_s)
                self._break_if_asked(index)
                outcome = self._stepper.step([stream])[0]
                if outcome.error is not None:
                    raise outcome.error
                stream.accept(outcome.drawn[0])
                for drawn in await stream.take():
                    yield _chunk(index, drawn, total)
                    index += 1
            usage = Usage(total, cached, index)
            yield Finish(stream.reason, usage, stream.output.close())
        finally:
            self._engine.release(sequence)
            await asyncio.sleep(self.plan.close_pause_s)
            self.closed += 1

    @staticmethod
    def _scripted(plan: FakePlan, request: Request, cached: int) -> Iterator[Event]:
        answer = plan.answer or ()
        spans = tuple(EvidenceSpan(*each) for each in plan.answer_evidence)
        said = answer[: request.stop.max_tokens]
        for index, (token, text) in enumerate(said):
            yield TokenChunk(index, (token,), text, spans if request.evidence else ())
        reason = "stop" if len(said) == len(answer) else "length"
        yield Finish(reason, Usage(len(request.token_ids), cached, len(said)))

    def _break_if_asked(self, index: int) -> None:
        if index == self.plan.fail_after_tokens:
            raise PenstockError("the decode worker went away", code="worker_unavailable")
        if index == self.plan.break_after_tokens:
            raise RuntimeError("a bug, made on purpose")

    async def readiness(self) -> Readiness:
        return Readiness(self.plan.ready, "" if self.plan.ready else "no prefill worker")

    async def workers(self) -> list[WorkerView]:
        info = self._engine.info
        return [
            WorkerView(
                worker_id=f"{role}-0",
                role=role,
                address="in-process",
                pid=os.getpid(),
                running=self.opened - self.closed,
                queued=0,
                queued_tokens=0,
                capacity_bytes=1 << 30,
                used_bytes=0,
                draining=False,
                fingerprint=info.fingerprint,
                max_model_len=info.max_model_len,
                bytes_per_token=info.layout.bytes_per_token,
                metrics={},
            )
            for role in ("prefill", "decode")
        ]

    async def _decide(self, request: Request) -> None:
        """As the router would, among the two workers that there seem to be."""
        board = Board()
        board.show(await self.workers())
        shape = Shape(len(request.token_ids), request.stop.max_tokens)
        self._decisions.keep(
            request.request_id,
            CostPolicy().choose(board, shape, NOTHING),
            tenant=request.tenant,
            at=time.time(),
            mirror_age_s=float("inf"),
            rows=2,
        )

    async def route_told(self, request_id: str, *, tenant: bytes) -> Told | None:
        return self._decisions.told(request_id, tenant=tenant)

    async def store_stat(self) -> dict[str, float]:
        return {"used_bytes": 0.0}

    async def expositions(self) -> list[bytes | None]:
        """Of workers that never did anything; the store does not answer."""
        return [
            worker_meters("prefill", "prefill-0").text(),
            worker_meters("decode", "decode-0").text(),
            None,
        ]

    async def close(self) -> None:
        self._engine.close()


def _stream_of(request: Request, sequence: EngineSequence) -> Stream:
    """The answer as a decode worker makes it, without company."""
    return Stream(
        sequence,
        request.sampling,
        Output(request.stop, frozenset({EOS}), ByteTokenizer().decode_bytes),
        Wishes(request.evidence, request.logits_digest, request.top_logprobs),
        lambda position, payload: None,
    )


def _chunk(index: int, drawn: Drawn, prompt_tokens: int) -> TokenChunk:
    return TokenChunk(
        index,
        (drawn.token,),
        drawn.text,
        tuple(of_prompt(drawn.evidence, prompt_tokens)),
        (drawn.digest,) if drawn.digest else (),
        () if drawn.logprobs is None else (drawn.logprobs,),
    )
