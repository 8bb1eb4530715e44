"""Calls from the front to workers and to the store node: channels, deadlines, error mapping."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

import grpc

from cluster.contracts import WorkerView
from cluster.policy import Route
from penstock import transport
from penstock.errors import StoreUnavailableError
from penstock.peers import ALONE, Peers
from penstock.request import (
    EvidenceSpan,
    Grammar,
    Progress,
    Request,
    Resume,
    TokenChunk,
    TokenLogprobs,
)
from penstock.rpc import channel_options, error_from_rpc, priority_on_wire
from penstock.telemetry.exporter import read_metrics
from protos.penstock.kv.v1 import kv_pb2, kv_pb2_grpc
from protos.penstock.worker.v1 import worker_pb2, worker_pb2_grpc

_SCRAPE_TIMEOUT_S = 2.0
_SCRAPES_AT_ONCE = 32

Hold = Callable[[Route, str], AbstractAsyncContextManager[None]]
"""Keeps both workers of a route from being taken down while a request runs (Ray Serve only)."""


@contextlib.asynccontextmanager
async def no_hold(route: Route, request_id: str) -> AsyncIterator[None]:
    """`Hold` of launchers that never take a worker down by themselves."""
    yield


class Cancellable(Protocol):
    def cancel(self) -> bool: ...


@dataclass(frozen=True)
class CallLimits:
    """Deadlines of a request's steps, in seconds."""

    request_timeout_s: float = 3600.0
    admission_timeout_s: float = 30.0
    max_prefill_wait_s: float = 600.0
    lease_ttl_s: float = 30.0


@dataclass(frozen=True)
class PrefillFinished:
    """End of the prefill worker's stream. `compute_s`: what the prompt's own steps took."""

    cached_tokens: int
    compute_s: float


@dataclass(frozen=True)
class DecodeFinished:
    """End of the decode worker's stream, before prefill's count of cached tokens is added."""

    reason: str
    completion_tokens: int
    text: str


class WorkerCalls:
    """One channel a worker address, kept while the front lives."""

    def __init__(self, limits: CallLimits, peers: Peers = ALONE) -> None:
        self._limits = limits
        self._peers = peers
        self._channels: dict[str, grpc.aio.Channel] = {}

    def _channel(self, address: str) -> grpc.aio.Channel:
        channel = self._channels.get(address)
        if channel is None:
            channel = transport.open_channel(self._peers, address, channel_options())
            self._channels[address] = channel
        return channel

    async def prefill(
        self, worker: WorkerView, request: Request, attempt: int = 0
    ) -> AsyncIterator[Progress | PrefillFinished]:
        """Progress until everything is committed, then the end. Raises the worker's error."""
        total, cached = len(request.token_ids), 0
        stub = worker_pb2_grpc.PrefillStub(self._channel(worker.address))
        call = stub.Run(
            worker_pb2.PrefillRequest(
                prompt=_prompt(request, worker),
                boundaries=request.boundaries,
                lease_ttl_ms=int(self._limits.lease_ttl_s * 1e3),
                most_wait_ms=int(self._limits.max_prefill_wait_s * 1e3),
                attempt=attempt,
            ),
            timeout=self._limits.request_timeout_s,
        )
        try:
            async for event in call:
                match event.WhichOneof("event"):
                    case "started":
                        cached = event.started.cached_tokens
                        yield Progress(cached, total, cached)
                    case "progress":
                        yield Progress(event.progress.tokens_done, total, cached)
                    case "done":
                        end = event.done
                        yield Progress(total, total, end.cached_tokens)
                        yield PrefillFinished(end.cached_tokens, end.compute_s)
                        return
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error, peer=f"the prefill worker {worker.worker_id}") from error
        finally:
            call.cancel()

    async def decode(
        self,
        worker: WorkerView,
        request: Request,
        resume: Resume,
        granted: Callable[[bool], None],
        calling: Callable[[Cancellable], None],
    ) -> AsyncIterator[TokenChunk | DecodeFinished]:
        """Calls `granted` when memory and a slot are reserved, then yields tokens and the end.

        `granted` gets whether prefill must run first, if `resume` is not a beginning. Cancelling
        what `calling` gets ends the wait for an event with CancelledError.
        """
        stop, sampling, limits = request.stop, request.sampling, self._limits
        stub = worker_pb2_grpc.DecodeStub(self._channel(worker.address))
        call = stub.Generate(
            worker_pb2.GenerateRequest(
                prompt=_prompt(request, worker),
                sampling=worker_pb2.Sampling(
                    temperature=sampling.temperature,
                    top_p=sampling.top_p,
                    top_k=sampling.top_k,
                    seed=sampling.seed,
                    choice=sampling.choice,
                    frequency_penalty=sampling.frequency_penalty,
                    presence_penalty=sampling.presence_penalty,
                    logit_bias=dict(sampling.logit_bias),
                ),
                max_tokens=stop.max_tokens,
                min_tokens=stop.min_tokens,
                ignore_eos=stop.ignore_eos,
                stop=stop.strings,
                evidence=request.evidence,
                logits_digest=request.logits_digest,
                top_logprobs=request.top_logprobs,
                grammar=_grammar(request.grammar),
                prefill_timeout_ms=int(limits.request_timeout_s * 1e3),
                lease_ttl_ms=int(limits.lease_ttl_s * 1e3),
                admission_timeout_ms=int(limits.admission_timeout_s * 1e3),
                attempt=resume.attempt,
                emitted=resume.emitted,
                tell_emitted=resume.tell_emitted,
                one_by_one=request.kept,
            ),
            timeout=limits.request_timeout_s,
        )
        calling(call)
        try:
            async for event in call:
                match event.WhichOneof("event"):
                    case "granted":
                        granted(event.granted.needs_prefill)
                    case "tokens":
                        yield _chunk(event.tokens)
                    case "finished":
                        end = event.finished
                        yield DecodeFinished(end.reason, end.completion_tokens, end.text)
                        return
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error, peer=f"the decode worker {worker.worker_id}") from error
        finally:
            call.cancel()

    async def expositions(self, addresses: Iterable[str]) -> list[bytes | None]:
        """What the workers there tell about themselves; None for one that does not answer."""
        places = asyncio.Semaphore(_SCRAPES_AT_ONCE)

        async def read(address: str) -> bytes | None:
            async with places:
                return await read_metrics(self._channel(address), timeout_s=_SCRAPE_TIMEOUT_S)

        return await asyncio.gather(*(read(address) for address in addresses))

    async def close(self) -> None:
        channels, self._channels = list(self._channels.values()), {}
        await asyncio.gather(*(c.close() for c in channels), return_exceptions=True)


def _prompt(request: Request, worker: WorkerView) -> worker_pb2.Prompt:
    return worker_pb2.Prompt(
        request_id=request.request_id,
        token_ids=request.token_ids,
        namespace=request.namespace,
        fingerprint=worker.fingerprint,
        tenant=request.tenant,
        priority=worker_pb2.Priority.ValueType(priority_on_wire(request.priority)),
    )


def _grammar(grammar: Grammar | None) -> worker_pb2.Grammar | None:
    if grammar is None:
        return None
    return worker_pb2.Grammar(text=grammar.text, starts_after=grammar.starts_after)


def _chunk(tokens: worker_pb2.Tokens) -> TokenChunk:
    return TokenChunk(
        index=tokens.index,
        token_ids=tuple(tokens.token_ids),
        text=tokens.text,
        evidence=tuple(EvidenceSpan(e.start, e.end, e.mass) for e in tokens.evidence),
        logits_digests=tuple(tokens.logits_digests),
        logprobs=tuple(
            TokenLogprobs(told.logprob, tuple(zip(told.top_ids, told.top_logprobs, strict=True)))
            for told in tokens.logprobs
        ),
        arrived_s=time.monotonic(),
    )


class StoreNode:
    """The front's view of the store node: its gauges, nothing of its contents."""

    def __init__(self, channel: grpc.aio.Channel, *, timeout_s: float = 2.0) -> None:
        self._channel = channel
        self._stub = kv_pb2_grpc.KvStoreStub(channel)
        self._timeout_s = timeout_s

    async def stat(self) -> dict[str, float]:
        """Gauges and counters by field name. Raises `StoreUnavailableError`."""
        try:
            answer = await self._stub.Stat(kv_pb2.StatRequest(), timeout=self._timeout_s)
        except grpc.aio.AioRpcError as error:
            raise StoreUnavailableError(
                f"the KV store node cannot be reached ({error.code().name})"
            ) from error
        return {
            field.name: float(getattr(answer, field.name))
            for field in answer.DESCRIPTOR.fields
            if field.type != field.TYPE_STRING
        }

    async def release(self, request_id: str) -> None:
        """Everything that a request holds there, whoever of its workers took it. Best effort: the
        workers do it too, and leases end by themselves.
        """
        with contextlib.suppress(grpc.aio.AioRpcError):
            request = kv_pb2.ReleaseRequest(owner=request_id)
            await self._stub.Release(request, timeout=self._timeout_s)

    async def exposition(self) -> bytes | None:
        """Its metrics as Prometheus text; None if it does not answer."""
        return await read_metrics(self._channel, timeout_s=_SCRAPE_TIMEOUT_S)

    async def close(self) -> None:
        await self._channel.close()
