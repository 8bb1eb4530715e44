"""How a process's metrics leave it: over its own gRPC port, and over HTTP if a port is named."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Iterator
from typing import Any

import grpc
from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client import Metric as Family

from penstock.telemetry.merge import MOST_BYTES
from penstock.telemetry.meters import Meters
from penstock.telemetry_spec import TelemetrySpec
from protos.penstock.telemetry.v1 import telemetry_pb2, telemetry_pb2_grpc

SERVICE = "penstock.telemetry.v1.Metrics"
_COLLECT_TIMEOUT_S = 2.0
_log = logging.getLogger(__name__)


def metrics_handler(meters: Meters) -> grpc.GenericRpcHandler:
    """The `Metrics` service, for a server on the event loop that `meters`' sources belong to."""

    async def read(request: telemetry_pb2.ReadRequest, context: Any) -> telemetry_pb2.ReadResponse:
        return telemetry_pb2.ReadResponse(text=meters.text())

    method = grpc.unary_unary_rpc_method_handler(
        read,
        request_deserializer=telemetry_pb2.ReadRequest.FromString,
        response_serializer=telemetry_pb2.ReadResponse.SerializeToString,
    )
    return grpc.method_handlers_generic_handler(SERVICE, {"Read": method})


async def read_metrics(channel: grpc.aio.Channel, *, timeout_s: float) -> bytes | None:
    """What the process at the other end tells; None if it does not answer in time."""
    stub = telemetry_pb2_grpc.MetricsStub(channel)
    try:
        answer = await stub.Read(telemetry_pb2.ReadRequest(), timeout=timeout_s)
    except grpc.aio.AioRpcError as error:
        _log.debug("metrics were not read: %s", error.code().name)
        return None
    return bytes(answer.text) if len(answer.text) <= MOST_BYTES else None


class HttpExporter:
    """`GET /metrics` of one process. `start` once on the process's loop; `close` may be repeated.

    The library's server has threads; the figures are read on the loop, where they belong.
    """

    def __init__(self, meters: Meters, spec: TelemetrySpec) -> None:
        self._meters = meters
        self._spec = spec
        self._loop: asyncio.AbstractEventLoop | None = None
        self._server: Any = None
        self._thread: threading.Thread | None = None

    def start(self) -> str | None:
        """HOST:PORT, or None if none is wanted or the port is taken: that must not stop serving."""
        host, port = self._spec.metrics_host, self._spec.metrics_port
        if port is None:
            return None
        self._loop = asyncio.get_running_loop()
        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        try:
            self._server, self._thread = start_http_server(port, host, registry)
        except OSError as error:
            _log.warning(
                "this process has no metrics port of its own: %s:%s (%s); the front's /metrics has "
                "its figures all the same",
                host,
                port,
                error.strerror,
            )
            return None
        address = f"{host}:{self._server.server_port}"
        _log.warning("metrics of this %s at http://%s/metrics", self._meters.process, address)
        return address

    def collect(self) -> Iterator[Family]:
        """prometheus_client's collector protocol; called from a thread of the server."""

        async def on_loop() -> list[Family]:
            return list(self._meters.collect())

        assert self._loop is not None
        future = asyncio.run_coroutine_threadsafe(on_loop(), self._loop)
        with contextlib.suppress(TimeoutError):
            return iter(future.result(_COLLECT_TIMEOUT_S))
        future.cancel()
        return iter([])

    def close(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            server.server_close()
