"""The prefill worker: the `Prefill` service over a `PromptRunner`, registered in the directory."""

from __future__ import annotations

import asyncio
import logging
import os
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

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
)
from penstock.identity import Chain
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
from penstock.telemetry import trace
from penstock.telemetry.meters import Meters
from penstock.telemetry.otlp import open_tracer
from penstock.telemetry.trace import NO_TRACER, Tracer
from penstock.telemetry.workers import worker_meters
from penstock.worker import WorkerSpec
from prefill.job import Listener, Outcome, Prompt, PromptRunner
from prefill.scheduler import PromptScheduler
from prefill.sequence import ModelThread
from protos.penstock.kv.v1 import kv_pb2
from protos.penstock.worker.v1 import worker_pb2

SERVICE = "penstock.worker.v1.Prefill"
_log = logging.getLogger(__name__)


async def open_worker(spec: WorkerSpec, start: RankStarter = ChildRank) -> PrefillWorker:
    """A worker with the engine and clients that `spec` names; its `stop` closes them.

    `start` starts the other ranks if the spec wants several.
    Raises ModelLoadError if the model cannot be opened. `start` it next.
    """
    try:
        engine = await asyncio.to_thread(
            open_engine, spec.model, spec.ranks, host=reachable(spec.listen_host), start=start
        )
    except (ImportError, OSError, ValueError, RuntimeError) as error:
        raise ModelLoadError(f"the model '{spec.model.model}' cannot be opened: {error}") from error
    meters = worker_meters("prefill", spec.worker_id)
    tracer = open_tracer(spec.telemetry, process="prefill", instance=spec.worker_id)
    store = StoreClient(
        spec.store_address,
        fingerprint=engine.info.fingerprint,
        layout=engine.info.layout,
        index=spec.index_url,
        peers=spec.peers,
        meter=meters,
    )
    directory = DirectoryClient(spec.store_address, peers=spec.peers)
    return PrefillWorker(
        spec,
        engine,
        store,
        directory,
        close_with=(store.close, directory.close, tracer.close),
        owns_engine=True,
        meters=meters,
        tracer=tracer,
    )


class PrefillWorker:
    """Belongs to one event loop. `start` once; `drain` and `stop` may be called again.

    `directory` None: not registered anywhere (tests). `close_with` is awaited at the end of `stop`;
    an engine that is not owned is left open.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        engine: Engine,
        store: BlockStore,
        directory: DirectoryClient | None = None,
        *,
        close_with: Sequence[Callable[[], Awaitable[None]]] = (),
        owns_engine: bool = False,
        meters: Meters | None = None,
        tracer: Tracer = NO_TRACER,
    ) -> None:
        self.spec = spec
        self.meters = meters or worker_meters("prefill", spec.worker_id)
        self.counters: Counter[str] = Counter()
        self.scheduler = PromptScheduler(
            capacity_bytes=spec.kv_memory_bytes,
            max_running=spec.max_running,
            max_queued=spec.max_queued,
            queue_timeout_s=spec.queue_timeout_s,
            chunk_tokens=spec.chunk_tokens,
        )
        self._engine = engine
        self._thread = ModelThread("prefill-model")
        self.runner = PromptRunner(engine, self._thread, store, self.scheduler, self.meters)
        self._host = WorkerHost(
            spec,
            SERVICE,
            {
                "Run": unary_stream(
                    worker_pb2.PrefillRequest, self._run, name="Prefill/Run", tracer=tracer
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
        return await self._host.start()

    def check(self) -> None:
        """Raises WorkerUnavailableError unless the worker serves and its ranks live."""
        self._host.check()
        self._engine.check()

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
        if self._owns_engine:
            await self._thread.run(self._engine.close)
        await self._thread.close()
        for close in self._close_with:
            await close()

    def describe(self) -> kv_pb2.Worker:
        """The directory's entry, as of now."""
        info, scheduler = self._engine.info, self.scheduler
        return kv_pb2.Worker(
            worker_id=self.spec.worker_id,
            role=kv_pb2.WORKER_ROLE_PREFILL,
            address=self.address,
            model=self.spec.model.served_name or self.spec.model.model,
            fingerprint=info.fingerprint,
            pid=os.getpid(),
            draining=self._host.draining,
            running=scheduler.running,
            queued=scheduler.queued,
            queued_tokens=scheduler.pending_tokens,
            capacity_bytes=scheduler.capacity_bytes,
            used_bytes=scheduler.used_bytes,
            max_model_len=info.max_model_len,
            bytes_per_token=info.layout.bytes_per_token,
            metrics=self.metrics(),
        )

    def metrics(self) -> dict[str, float]:
        """Counters since the start and gauges, by name."""
        scheduler = self.scheduler
        counters = self.counters + self._host.counters
        values: dict[str, float] = {name: float(counters[name]) for name in _COUNTERS}
        values |= {
            "running": float(scheduler.running),
            "queued": float(scheduler.queued),
            "reserved_bytes": float(scheduler.used_bytes),
            "pending_tokens": float(scheduler.pending_tokens),
            "tokens_per_s": scheduler.tokens_per_s,
        }
        return values

    def _read_metrics(self) -> None:
        counters = self.counters
        for metric in (M.PREFILL_COMPUTED, M.PREFILL_CACHED, M.PREFILL_PUBLISHED):
            self.meters.read(metric, partial(counters.__getitem__, metric.name[len("worker_") :]))
        costs = self.runner.costs
        self.meters.read(M.FETCH_LATENCY, lambda: costs.fetch.factors[0])
        self.meters.read(M.FETCH_BANDWIDTH, lambda: 1 / costs.fetch.factors[1])
        self.meters.read(M.TOKEN_COST, lambda: costs.compute.factors[0])
        self.meters.read(M.TOKEN_CONTEXT_COST, lambda: costs.compute.factors[1])
        self.meters.read(M.PREFILL_PENDING, lambda: self.scheduler.pending_tokens)

    async def _run(self, request: worker_pb2.PrefillRequest, write: Write) -> None:
        """The RPC: one prompt."""
        with self._host.call() as has_told:
            prompt = await asyncio.to_thread(self._read, request)
            outcome = await self.runner.run(prompt, _listener(write))
            self._count(outcome)
            _log.info(
                "prompt read", extra={"facts": {"answer_id": prompt.request_id, **vars(outcome)}}
            )
            trace.note(cached_tokens=outcome.cached_tokens, computed_tokens=outcome.computed_tokens)
            has_told()
            await write(_done(outcome))

    def _read(self, request: worker_pb2.PrefillRequest) -> Prompt:
        """In a thread: copying and hashing a million tokens takes some 100 ms."""
        asked, info = request.prompt, self._engine.info
        check_fingerprint(asked.fingerprint, info.fingerprint)
        tokens = tuple(asked.token_ids)
        check_tokens(tokens, info.vocab_size)
        if not asked.request_id or len(asked.namespace) != 32:
            raise InvalidRequestError("a prompt needs a request id and a namespace of 32 bytes")
        if len(tokens) > info.max_model_len:
            raise ContextLengthError(
                f"the prompt has {len(tokens)} tokens but the model takes at most "
                f"{info.max_model_len}",
                param="messages",
            )
        chain = Chain.start(info.fingerprint, asked.namespace).extend(tokens)
        lease_ttl_s = request.lease_ttl_ms / 1e3 or self.spec.lease_ttl_s
        return Prompt(
            asked.request_id,
            chain,
            tuple(request.boundaries),
            lease_ttl_s,
            tenant=asked.tenant,
            priority=priority_of(asked.priority),
            most_wait_s=request.most_wait_ms / 1e3 if request.HasField("most_wait_ms") else None,
            attempt=request.attempt,
        )

    def _count(self, outcome: Outcome) -> None:
        self.counters["prefill_computed_tokens_total"] += outcome.computed_tokens
        self.counters["prefill_cached_tokens_total"] += outcome.cached_tokens
        self.counters["bytes_published_total"] += outcome.bytes_published


_COUNTERS = (
    "requests_total",
    "requests_failed_total",
    "requests_cancelled_total",
    "prefill_computed_tokens_total",
    "prefill_cached_tokens_total",
    "bytes_published_total",
)


def _listener(write: Write) -> Listener:
    async def started(cached_tokens: int) -> None:
        event = worker_pb2.PrefillStarted(cached_tokens=cached_tokens)
        await write(worker_pb2.PrefillEvent(started=event))

    async def progress(tokens_done: int) -> None:
        event = worker_pb2.PrefillProgress(tokens_done=tokens_done)
        await write(worker_pb2.PrefillEvent(progress=event))

    return Listener(started, progress)


def _done(outcome: Outcome) -> worker_pb2.PrefillEvent:
    return worker_pb2.PrefillEvent(
        done=worker_pb2.PrefillDone(
            cached_tokens=outcome.cached_tokens,
            computed_tokens=outcome.computed_tokens,
            compute_s=outcome.compute_s,
            bytes_published=outcome.bytes_published,
        )
    )
