"""The decode worker: the `Decode` service over an `AnswerRunner`, registered in the directory."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

from decode.admission import Admission, Need
from decode.batch import Batch
from decode.detokenize import DecodeBytes
from decode.evidence import of_prompt
from decode.fence import Fence
from decode.grammar import Constraint, Grammars, LlGrammars
from decode.job import AnswerRunner, Listener, Order
from decode.stream import Drawn, Wishes
from kvstore.client import StoreClient
from kvstore.contracts import BlockStore
from kvstore.directory_client import DirectoryClient
from model.engine import Engine
from model.open import open_engine
from model.ranks.followers import ChildRank, RankStarter
from penstock.errors import (
    ContextLengthError,
    InvalidRequestError,
    ModelLoadError,
    WorkerUnavailableError,
)
from penstock.identity import Chain
from penstock.request import Grammar, Resume, Sampling, StopRule, TokenLogprobs
from penstock.rpc import (
    WorkerHost,
    Write,
    check_fingerprint,
    check_tokens,
    priority_of,
    reachable,
    unary_stream,
)
from penstock.telemetry import catalog as M
from penstock.telemetry.meters import Meters
from penstock.telemetry.otlp import open_tracer
from penstock.telemetry.trace import NO_TRACER, Tracer
from penstock.telemetry.workers import worker_meters
from penstock.tokenizer import Tokenizer, open_tokenizer
from penstock.worker import WorkerSpec
from protos.penstock.kv.v1 import kv_pb2
from protos.penstock.worker.v1 import worker_pb2

SERVICE = "penstock.worker.v1.Decode"
DEFAULT_PREFILL_TIMEOUT_S = 3600.0


async def open_worker(spec: WorkerSpec, start: RankStarter = ChildRank) -> DecodeWorker:
    """A worker with the engine and clients that `spec` names; its `stop` closes them.

    `start` starts the other ranks if the spec wants several.
    Raises ModelLoadError if the model cannot be opened. `start` it next.
    """
    try:
        engine = await asyncio.to_thread(
            open_engine, spec.model, spec.ranks, host=reachable(spec.listen_host), start=start
        )
        tokenizer = await asyncio.to_thread(open_tokenizer, spec.model.model)
    except (ImportError, OSError, ValueError, RuntimeError) as error:
        raise ModelLoadError(f"the model '{spec.model.model}' cannot be opened: {error}") from error
    meters = worker_meters("decode", spec.worker_id)
    tracer = open_tracer(spec.telemetry, process="decode", instance=spec.worker_id)
    store = StoreClient(
        spec.store_address,
        fingerprint=engine.info.fingerprint,
        layout=engine.info.layout,
        index=spec.index_url,
        peers=spec.peers,
        meter=meters,
    )
    directory = DirectoryClient(spec.store_address, peers=spec.peers)
    return DecodeWorker(
        spec,
        engine,
        store,
        directory,
        decode_bytes=None if tokenizer is None else tokenizer.decode_bytes,
        grammars=None if tokenizer is None else _grammars(tokenizer, engine),
        close_with=(store.close, directory.close, tracer.close),
        owns_engine=True,
        meters=meters,
        tracer=tracer,
    )


class DecodeWorker:
    """Belongs to one event loop. `start` once; `drain` and `stop` may be called again.

    `directory` None: not registered anywhere (tests). `decode_bytes` None: token ids without text.
    `grammars` None: requests with a grammar are refused.
    `close_with` is awaited at the end of `stop`; an engine that is not owned is left open.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        engine: Engine,
        store: BlockStore,
        directory: DirectoryClient | None = None,
        *,
        decode_bytes: DecodeBytes | None = None,
        grammars: Grammars | None = None,
        close_with: Sequence[Callable[[], Awaitable[None]]] = (),
        owns_engine: bool = False,
        meters: Meters | None = None,
        tracer: Tracer = NO_TRACER,
    ) -> None:
        self.spec = spec
        self.meters = meters or worker_meters("decode", spec.worker_id)
        self.counters: Counter[str] = Counter()
        self.admission = Admission(
            capacity_bytes=spec.kv_memory_bytes,
            max_running=spec.max_running,
            max_queued=spec.max_queued,
            grant_ttl_s=spec.grant_ttl_s,
        )
        self.batch = Batch(engine, self.meters)
        self.runner = AnswerRunner(
            engine,
            self.batch,
            store,
            self.admission,
            decode_bytes,
            self.counters,
            self.meters,
            spec.answer_room_tokens,
        )
        self._engine = engine
        self._fence = Fence()
        self._grammars = grammars
        self._host = WorkerHost(
            spec,
            SERVICE,
            {
                "Generate": unary_stream(
                    worker_pb2.GenerateRequest,
                    self._generate,
                    name="Decode/Generate",
                    tracer=tracer,
                )
            },
            describe=self.describe,
            registry=directory,
            meters=self.meters,
        )
        self._read_metrics()
        self._close_with = tuple(close_with)
        self._owns_engine = owns_engine
        self._stopped = False

    @property
    def address(self) -> str:
        return self._host.address

    async def start(self) -> str:
        """Serve and register; the address. Raises StoreUnavailableError without the directory."""
        self.batch.start()
        return await self._host.start()

    def check(self) -> None:
        """Raises WorkerUnavailableError unless the worker serves, its batch runs and its ranks
        live.
        """
        self._host.check()
        self._engine.check()
        if not self.batch.is_alive:
            raise WorkerUnavailableError(f"decode worker {self.spec.worker_id} has no batch")

    async def drain(self, timeout_s: float = 60.0) -> bool:
        """Refuse new requests and wait for those that run. False if some still run after that."""
        return await self._host.drain(timeout_s)

    async def stop(self) -> None:
        """Cancel what runs, leave the directory, close what `open_worker` opened."""
        await self._host.stop()
        if self._stopped:
            return
        self._stopped = True
        await self.runner.settle()
        await self.batch.stop()
        if self._owns_engine:
            # The batch's thread has ended: nobody else drives the engine any more.
            await asyncio.to_thread(self._engine.close)
        for close in self._close_with:
            await close()

    def describe(self) -> kv_pb2.Worker:
        """The directory's entry, as of now."""
        info, admission = self._engine.info, self.admission
        return kv_pb2.Worker(
            worker_id=self.spec.worker_id,
            role=kv_pb2.WORKER_ROLE_DECODE,
            address=self.address,
            model=self.spec.model.served_name or self.spec.model.model,
            fingerprint=info.fingerprint,
            pid=os.getpid(),
            draining=self._host.draining,
            running=admission.running,
            queued=admission.queued,
            queued_tokens=admission.tokens,
            capacity_bytes=admission.capacity_bytes,
            used_bytes=admission.reserved_bytes,
            max_model_len=info.max_model_len,
            bytes_per_token=info.layout.bytes_per_token,
            metrics=self.metrics(),
        )

    def metrics(self) -> dict[str, float]:
        """Counters since the start and gauges, by name."""
        admission = self.admission
        counters = self.counters + self._host.counters
        values: dict[str, float] = {name: float(counters[name]) for name in _COUNTERS}
        values |= {
            "decode_generated_tokens_total": float(self.batch.generated_tokens),
            "decode_steps_total": float(self.batch.steps),
            # What was computed without having been drawn here can only be of a prompt: promised 0.
            "decode_prompt_tokens_computed_total": float(self.batch.unfed_tokens),
            "running": float(admission.running),
            "queued": float(admission.queued),
            "reserved_bytes": float(admission.reserved_bytes),
            "pages": float(admission.pages),
            "slots": float(admission.max_running),
            "step_s": self.batch.step_s,
        }
        if self._engine.info.draft_tokens:
            values |= self.batch.drafts.metrics()
        return values

    def _read_metrics(self) -> None:
        batch, drafts, counters, meters = self.batch, self.batch.drafts, self.counters, self.meters
        meters.read(M.DECODE_TOKENS, lambda: batch.generated_tokens)
        meters.read(M.DECODE_STEPS, lambda: batch.steps)
        meters.read(M.DECODE_PROMPT_COMPUTED, lambda: batch.unfed_tokens)
        meters.read(M.DECODE_PAGES, lambda: self.admission.pages)
        for metric in (M.DECODE_ATTACHED, M.DECODE_REPLAYED, M.DECODE_PUBLISH_FAILURES):
            meters.read(metric, partial(counters.__getitem__, metric.name[len("worker_") :]))
        meters.read(M.DRAFTS, lambda: drafts.drafts)
        meters.read(M.DRAFT_TOKENS, lambda: drafts.draft_tokens)
        meters.read(M.DRAFT_ACCEPTED, lambda: drafts.accepted_tokens)
        for place, metric in enumerate(M.DRAFT_ACCEPTED_AT):
            meters.read(metric, partial(drafts.accepted_at.__getitem__, place))

    async def _generate(self, request: worker_pb2.GenerateRequest, write: Write) -> None:
        """The RPC: one answer."""
        name = request.prompt.request_id
        with self._host.call() as has_told, self._fence.only(name, request.attempt):
            news = _Events(
                self.spec.worker_id,
                write,
                has_told,
                prompt_tokens=len(request.prompt.token_ids),
                one_by_one=request.evidence or request.one_by_one or request.tell_emitted,
            )
            order = await asyncio.to_thread(self._read, request)
            await self.runner.run(order, Listener(news.granted, news.tokens, news.finished))

    def _constraint(self, request: worker_pb2.GenerateRequest) -> Constraint:
        if self._grammars is None:
            raise InvalidRequestError(
                "this model has no tokenizer.json, which a grammar needs", param="response_format"
            )
        asked = request.grammar
        after = asked.starts_after if asked.HasField("starts_after") else None
        return self._grammars.open(Grammar(asked.text, after), request.emitted)

    def _read(self, request: worker_pb2.GenerateRequest) -> Order:
        """In a thread: copying and hashing a million tokens takes some 100 ms."""
        asked, info = request.prompt, self._engine.info
        check_fingerprint(asked.fingerprint, info.fingerprint)
        tokens = tuple(asked.token_ids)
        check_tokens(tokens, info.vocab_size)
        resume = Resume(request.attempt, tuple(request.emitted), request.tell_emitted)
        if resume.emitted:
            check_tokens(resume.emitted, info.vocab_size)
        if not asked.request_id or len(asked.namespace) != 32:
            raise InvalidRequestError("a prompt needs a request id and a namespace of 32 bytes")
        rule = StopRule(
            request.max_tokens, request.min_tokens, request.ignore_eos, tuple(request.stop)
        )
        if len(tokens) + rule.max_tokens > info.max_model_len:
            raise ContextLengthError(
                f"the prompt has {len(tokens)} tokens and max_tokens is {rule.max_tokens}: more "
                f"than the {info.max_model_len} tokens of the model's context",
                param="max_tokens",
            )
        if len(resume.emitted) > rule.max_tokens:
            raise InvalidRequestError("more tokens were emitted than the answer may have")
        whole = resume.absorbed(tokens)
        return Order(
            request_id=asked.request_id,
            chain=Chain.start(info.fingerprint, asked.namespace).extend(whole),
            prompt_tokens=len(tokens),
            resume=resume,
            sampling=_sampling(request.sampling, info.vocab_size),
            rule=rule,
            wishes=Wishes(
                request.evidence,
                request.logits_digest,
                request.top_logprobs if request.HasField("top_logprobs") else None,
            ),
            constraint=self._constraint(request) if request.HasField("grammar") else None,
            prefill_timeout_s=request.prefill_timeout_ms / 1e3 or DEFAULT_PREFILL_TIMEOUT_S,
            admission_timeout_s=request.admission_timeout_ms / 1e3,
            lease_ttl_s=request.lease_ttl_ms / 1e3 or self.spec.lease_ttl_s,
            tenant=asked.tenant,
            priority=priority_of(asked.priority),
        )


def _grammars(tokenizer: Tokenizer, engine: Engine) -> LlGrammars:
    info = engine.info
    return LlGrammars(tokenizer, vocab_size=info.vocab_size, eos=info.eos_token_ids)


def _sampling(wish: worker_pb2.Sampling, vocab_size: int) -> Sampling:
    bias = tuple(sorted(wish.logit_bias.items()))
    if bias and bias[-1][0] >= vocab_size:
        raise InvalidRequestError(
            f"logit_bias names token {bias[-1][0]}, outside the vocabulary of {vocab_size}",
            param="logit_bias",
        )
    return Sampling(
        temperature=wish.temperature,
        # Unset it is 0 on the wire.
        top_p=wish.top_p or 1.0,
        top_k=wish.top_k,
        seed=wish.seed,
        choice=wish.choice,
        frequency_penalty=wish.frequency_penalty,
        presence_penalty=wish.presence_penalty,
        logit_bias=bias,
    )


_COUNTERS = (
    "requests_total",
    "requests_failed_total",
    "requests_cancelled_total",
    "decode_attached_tokens_total",
    "decode_replayed_tokens_total",
    "decode_grown_total",
    "decode_rested_total",
    "decode_publish_failures_total",
)


def _logprobs(told: TokenLogprobs) -> worker_pb2.TokenLogprobs:
    return worker_pb2.TokenLogprobs(
        logprob=told.logprob,
        top_ids=[token for token, _ in told.top],
        top_logprobs=[logprob for _, logprob in told.top],
    )


class _Events:
    """An answer's news as messages of the stream."""

    def __init__(
        self,
        worker_id: str,
        write: Write,
        has_told: Callable[[], None],
        *,
        prompt_tokens: int,
        one_by_one: bool,
    ) -> None:
        """`one_by_one`: evidence belongs to one token, so each gets an event of its own."""
        self._worker_id = worker_id
        self._prompt_tokens = prompt_tokens
        self._write = write
        self._one_by_one = one_by_one
        self._has_told = has_told

    async def granted(self, need: Need, needs_prefill: bool) -> None:
        event = worker_pb2.Granted(
            worker_id=self._worker_id,
            reserved_bytes=need.size_bytes,
            needs_prefill=needs_prefill,
        )
        await self._write(worker_pb2.GenerateEvent(granted=event))

    async def tokens(self, index: int, drawn: list[Drawn]) -> None:
        groups = [[one] for one in drawn] if self._one_by_one else [drawn]
        for group in groups:
            event = worker_pb2.Tokens(
                index=index,
                token_ids=[one.token for one in group],
                text="".join(one.text for one in group),
                evidence=[
                    worker_pb2.EvidenceSpan(start=span.start, end=span.end, mass=span.mass)
                    for one in group
                    for span in of_prompt(one.evidence, self._prompt_tokens)
                ],
                logits_digests=[one.digest for one in group if one.digest],
                logprobs=[_logprobs(one.logprobs) for one in group if one.logprobs is not None],
            )
            await self._write(worker_pb2.GenerateEvent(tokens=event))
            index += len(group)

    async def finished(self, reason: str, completion_tokens: int, text: str) -> None:
        event = worker_pb2.Finished(reason=reason, completion_tokens=completion_tokens, text=text)
        self._has_told()
        await self._write(worker_pb2.GenerateEvent(finished=event))
