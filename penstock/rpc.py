"""gRPC between the front and the workers: options, errors across the wire, the workers' server.

An error crosses as status code and sentence, plus its `code` and retry time in trailing metadata;
`error_from_rpc` rebuilds the same class on the other side.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, contextmanager
from typing import Any, Protocol, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health

from penstock import transport
from penstock.errors import (
    DeadlineError,
    FingerprintMismatchError,
    InvalidRequestError,
    OverloadedError,
    PenstockError,
    UsageError,
    WorkerUnavailableError,
    from_code,
)
from penstock.peers import ALONE, Peers
from penstock.request import Priority
from penstock.telemetry import logs
from penstock.telemetry.exporter import HttpExporter, metrics_handler
from penstock.telemetry.meters import Meters
from penstock.telemetry.trace import NO_TRACER, Tracer
from penstock.telemetry.workers import read_entry
from penstock.worker import WorkerSpec
from protos.penstock.kv.v1 import kv_pb2

CODE_KEY = "penstock-code"
RETRY_KEY = "retry-after-ms"
PARAM_KEY = "penstock-param"
REASON_KEY = "penstock-reason"
MAX_MESSAGE_BYTES = 32 << 20
"""A prompt of a million tokens takes at most 5 MB; this leaves room for several."""
_MAX_DETAIL_CHARS = 2_000
_STOP_GRACE_S = 1.0
_SPARE_CALLS = 64
"""Calls beyond running and queued ones, so that refusals and health checks get through."""

_log = logging.getLogger(__name__)

Request = TypeVar("Request", bound=Message)
Write = Callable[[Any], Awaitable[None]]
Handler = Callable[[Request, Write], Awaitable[None]]


def channel_options() -> list[tuple[str, int]]:
    """Client side: large prompts fit, dead peers are noticed within 15 s, reconnects are quick."""
    return [
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.keepalive_time_ms", 10_000),
        ("grpc.keepalive_timeout_ms", 5_000),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 1_000),
    ]


def server_options() -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        # Two workers on one port would each see half of the calls.
        ("grpc.so_reuseport", 0),
        # A front that vanished without a word must not keep memory and leases.
        ("grpc.keepalive_time_ms", 10_000),
        ("grpc.keepalive_timeout_ms", 5_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
        ("grpc.http2.max_ping_strikes", 0),
    ]


def error_from_rpc(error: grpc.aio.AioRpcError, *, peer: str) -> PenstockError:
    """The error tree's word for a failed call to `peer` (a name for the sentence)."""
    code, message = error.code(), error.details() or ""
    metadata = {str(key): str(value) for key, value in error.trailing_metadata() or ()}
    if CODE_KEY in metadata:
        retry = metadata.get(RETRY_KEY, "")
        retry_after_s = int(retry) / 1e3 if retry.isdigit() else None
        return from_code(
            metadata[CODE_KEY],
            message,
            param=metadata.get(PARAM_KEY),
            retry_after_s=retry_after_s,
            reason=metadata.get(REASON_KEY),
        )
    match code:
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return DeadlineError(f"{peer} did not finish in time")
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            return OverloadedError(f"{peer} refused the call: {message}")
        case grpc.StatusCode.CANCELLED:
            # Our own cancel raises asyncio's exception; this one is a peer that went down.
            return WorkerUnavailableError(f"{peer} ended the call: {message}")
        case grpc.StatusCode.UNAVAILABLE:
            return WorkerUnavailableError(f"{peer} cannot be reached: {message}")
        case grpc.StatusCode.INTERNAL | grpc.StatusCode.UNKNOWN:
            # Our servers say their code with every error: these words are the transport's.
            return WorkerUnavailableError(f"the connection to {peer} broke: {message}")
        case grpc.StatusCode.INVALID_ARGUMENT:
            return InvalidRequestError(message)
        case _:
            return PenstockError(f"{peer} failed ({code.name}): {message}")


async def abort_with(context: Any, error: PenstockError) -> None:
    """End the call with `error`. Always raises (grpc's own exception)."""
    metadata = [(CODE_KEY, error.code or "")]
    if error.retry_after_s is not None:
        metadata.append((RETRY_KEY, str(int(error.retry_after_s * 1e3))))
    if error.param is not None:
        metadata.append((PARAM_KEY, error.param))
    if error.reason is not None:
        metadata.append((REASON_KEY, error.reason))
    code = getattr(grpc.StatusCode, error.grpc_code)
    await context.abort(code, error.message[:_MAX_DETAIL_CHARS], trailing_metadata=tuple(metadata))


def unary_stream(
    request_type: type[Request],
    handler: Handler[Request],
    *,
    name: str = "",
    tracer: Tracer = NO_TRACER,
) -> Any:
    """A method that answers one request with a stream of messages, errors mapped.

    `handler` is cancelled when the client cancels or its deadline passes. With a `tracer` a call
    that carries a trace is a span `name` of it.
    """

    async def handle(raw: bytes, context: Any) -> None:
        try:
            try:
                request = request_type.FromString(raw)
            except DecodeError as error:
                raise InvalidRequestError(f"the bytes are no {request_type.__name__}") from error
            metadata = context.invocation_metadata() or ()
            with logs.received(metadata), tracer.entry(name, metadata):
                await handler(request, context.write)
        except PenstockError as error:
            await abort_with(context, error)
        except asyncio.CancelledError:
            raise
        except grpc.aio.BaseError:
            # The client went away between two writes; there is nobody to tell.
            _log.debug("the client of a stream went away", exc_info=True)
        except Exception as error:
            # The boundary: whatever else went wrong becomes a sentence here and a trace in the log.
            _log.exception("a request failed in an unexpected way")
            await abort_with(context, PenstockError(f"the worker failed: {error}"))

    return grpc.unary_stream_rpc_method_handler(
        handle, response_serializer=lambda message: message.SerializeToString()
    )


class WorkerServer:
    """One gRPC server with a health service, on a port of its own. `stop` may be called again."""

    def __init__(
        self,
        service: str,
        methods: dict[str, Any],
        *,
        host: str,
        max_concurrent_calls: int,
        meters: Meters,
        peers: Peers = ALONE,
    ) -> None:
        self._service = service
        self._host = host
        self._peers = peers
        self._health: Any = health.HealthServicer()
        self._server = grpc.aio.server(
            options=server_options(),
            maximum_concurrent_rpcs=max_concurrent_calls,
            interceptors=transport.gates(peers),
        )
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(service, methods), metrics_handler(meters))
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)

    async def start(self) -> str:
        """The address that others can call. Raises UsageError if the host cannot be bound."""
        bracketed = f"[{self._host}]" if ":" in self._host else self._host
        try:
            port = transport.bind(self._peers, self._server, f"{bracketed}:0")
        except RuntimeError as error:
            raise UsageError(f"a worker cannot listen on {self._host}: {error}") from error
        await self._server.start()
        await self.set_serving(True)
        return f"{reachable(bracketed)}:{port}"

    async def set_serving(self, serving: bool) -> None:
        """What the health service answers."""
        status = health_pb2.HealthCheckResponse.SERVING
        if not serving:
            status = health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ("", self._service):
            await self._health.set(name, status)

    async def stop(self, grace_s: float) -> None:
        """Refuse new calls, give running ones `grace_s`, then cancel them."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)


class Registry(Protocol):
    """What a worker needs of the directory (`kvstore.directory_client.DirectoryClient`)."""

    async def register(self, worker: kv_pb2.Worker, *, ttl_s: float) -> int: ...

    def registered(
        self, describe: Callable[[], kv_pb2.Worker], *, ttl_s: float, period_s: float
    ) -> AbstractAsyncContextManager[None]: ...


class WorkerHost:
    """What workers of both roles share: a server, an entry in the directory, counted calls, drain.

    Belongs to one event loop. `start` once; `drain` and `stop` may be called again.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        service: str,
        methods: dict[str, Any],
        *,
        describe: Callable[[], kv_pb2.Worker],
        registry: Registry | None,
        meters: Meters,
    ) -> None:
        """`registry` None: registered nowhere. `describe` gives the entry as of now."""
        self.address = ""
        self.draining = False
        self.counters: Counter[str] = Counter()
        """`requests_total`, `requests_failed_total`, `requests_cancelled_total`."""
        self._spec = spec
        self._service = service
        self._methods = methods
        self._describe = describe
        self._registry = registry
        self._meters = meters
        self._exporter = HttpExporter(meters, spec.telemetry)
        read_entry(meters, describe, self.counters)
        self._registration = AsyncExitStack()
        self._server: WorkerServer | None = None
        self._calls = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def start(self) -> str:
        """Serve and register; the address. Raises StoreUnavailableError without the directory."""
        spec = self._spec
        self._server = WorkerServer(
            self._service,
            self._methods,
            host=spec.listen_host,
            max_concurrent_calls=spec.max_running + spec.max_queued + _SPARE_CALLS,
            peers=spec.peers,
            meters=self._meters,
        )
        self.address = await self._server.start()
        self._exporter.start()
        if self._registry is not None:
            await self._registration.enter_async_context(
                self._registry.registered(
                    self._describe, ttl_s=spec.directory_ttl_s, period_s=spec.heartbeat_s
                )
            )
        return self.address

    def check(self) -> None:
        """Raises WorkerUnavailableError unless the server is up."""
        if self._server is None:
            raise WorkerUnavailableError(f"worker {self._spec.worker_id} does not serve")

    @contextmanager
    def call(self) -> Iterator[Callable[[], None]]:
        """Counts one request and how it ends. Raises WorkerUnavailableError while draining.

        What it gives is to be called once the client has been told the end: hanging up after that
        cancels nothing.
        """
        if self.draining:
            raise WorkerUnavailableError(f"worker {self._spec.worker_id} is draining")
        self.counters["requests_total"] += 1
        self._calls += 1
        self._idle.clear()
        told = False

        def has_told() -> None:
            nonlocal told
            told = True

        try:
            yield has_told
        except asyncio.CancelledError:
            self.counters["requests_cancelled_total"] += not told
            raise
        except Exception:
            self.counters["requests_failed_total"] += not told
            raise
        finally:
            self._calls -= 1
            if not self._calls:
                self._idle.set()

    async def drain(self, timeout_s: float) -> bool:
        """Refuse new requests and wait for those that run. False if some still run after that."""
        self.draining = True
        if self._server is not None:
            await self._server.set_serving(False)
            await self._announce()
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    async def stop(self) -> None:
        """Leave the directory, refuse new requests, cancel those that run."""
        self.draining = True
        self._exporter.close()
        await self._registration.aclose()
        server, self._server = self._server, None
        if server is not None:
            await server.stop(_STOP_GRACE_S)

    async def _announce(self) -> None:
        if self._registry is None:
            return
        try:
            await self._registry.register(self._describe(), ttl_s=self._spec.directory_ttl_s)
        except PenstockError as error:
            # The next heartbeat says the same.
            _log.debug("the directory was not told of the drain: %s", error.message)


def reachable(host: str) -> str:
    """A wildcard is no address to call: this machine's own instead."""
    if host not in ("0.0.0.0", "::", "[::]"):
        return host
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return "127.0.0.1"


def check_fingerprint(asked: bytes, own: bytes) -> None:
    """Raises FingerprintMismatchError unless a request was meant for this worker's numbers."""
    if asked != own:
        raise FingerprintMismatchError(
            f"the request is for fingerprint {asked.hex()[:12] or '(none)'} but this worker serves "
            f"{own.hex()[:12]}: they differ in weights, formats or numerics"
        )


def check_tokens(tokens: Sequence[int], vocab_size: int) -> None:
    """Raises InvalidRequestError for an empty prompt or an id outside the vocabulary."""
    if not tokens:
        raise InvalidRequestError("the prompt is empty", param="messages")
    highest = max(tokens)
    if highest >= vocab_size:
        raise InvalidRequestError(
            f"token id {highest} is outside the vocabulary of {vocab_size}", param="tokens"
        )


def priority_of(wire: int) -> Priority:
    """What a worker's message names; anything unknown is normal."""
    return {1: Priority.INTERACTIVE, 3: Priority.BATCH}.get(wire, Priority.NORMAL)


def priority_on_wire(priority: Priority) -> int:
    """`penstock.worker.v1.Priority`."""
    return int(priority) + 1
