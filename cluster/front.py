"""The front process: the HTTP API over `Flow`. A Ray Serve ingress replica, or `python -m
cluster.front`.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import threading
from typing import TYPE_CHECKING, Any, cast

from pydantic import BaseModel, ConfigDict

from cluster.config import ClusterConfig
from cluster.flow import Flow
from cluster.router import Router
from cluster.workers import CallLimits, Hold, StoreNode, WorkerCalls, no_hold
from penstock import transport
from penstock.errors import PenstockError
from penstock.rpc import channel_options
from penstock.telemetry.exporter import HttpExporter
from penstock.telemetry.logs import configure_logging

if TYPE_CHECKING:
    from fastapi import FastAPI

    from kvstore.journal.streams import StreamJournal


class FrontSpec(BaseModel):
    """All that a front process is told."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    config: ClusterConfig
    store_address: str


def open_service(spec: FrontSpec, *, hold: Hold = no_hold) -> Flow:
    """Must run inside the event loop that will serve: gRPC channels belong to it."""
    front = spec.config.front
    peers, options = spec.config.tls, channel_options()
    return Flow(
        router=Router(
            transport.open_channel(peers, spec.store_address, options),
            policy=spec.config.router.policy,
        ),
        calls=WorkerCalls(
            CallLimits(
                request_timeout_s=front.request_timeout_s,
                admission_timeout_s=front.admission_timeout_s,
                max_prefill_wait_s=front.max_prefill_wait_s,
            ),
            peers,
        ),
        store=StoreNode(transport.open_channel(peers, spec.store_address, options)),
        served_name=spec.config.served_name,
        hold=hold,
        failover_timeout_s=front.failover_timeout_s,
    )


def open_exporter(spec: FrontSpec, app: FastAPI) -> HttpExporter:
    """The front's own metrics on a port of their own, if one is configured."""
    exporter = HttpExporter(app.state.penstock.telemetry.meters, spec.config.telemetry)
    exporter.start()
    return exporter


def build_app(spec: FrontSpec, service: Flow) -> FastAPI:
    from cluster.api import create_app
    from cluster.batch.lines import Inside
    from cluster.batch.room import BatchRoom
    from cluster.batch.surroundings import Surroundings
    from penstock.chat import open_chat
    from penstock.folder import sampling_defaults
    from penstock.telemetry import Telemetry
    from penstock.telemetry.otlp import open_tracer
    from penstock.tokenizer import open_tokenizer

    model = spec.config.model.model
    tokenizer = open_tokenizer(model)
    chat = open_chat(model, tokenizer) if tokenizer is not None else None

    def open_batch(around: Surroundings, inside: Inside) -> BatchRoom:
        return BatchRoom(
            spec.config.batch,
            around,
            lambda: transport.open_channel(spec.config.tls, spec.store_address, channel_options()),
            inside,
        )

    telemetry = Telemetry(open_tracer(spec.config.telemetry, process="front"))
    service.ground.tell(telemetry.meters)
    return create_app(
        service,
        tokenizer=tokenizer,
        chat=chat,
        config=spec.config.front,
        telemetry=telemetry,
        sampling_defaults=sampling_defaults(model),
        batch=open_batch,
        streams=_open_streams(spec),
    )


def _open_streams(spec: FrontSpec) -> StreamJournal | None:
    from kvstore.journal.journal import open_streams

    front = spec.config.front
    if not front.stream_kept_s:
        return None
    url = spec.config.batch.streams(front.port)
    return open_streams(url, ttl_s=front.stream_kept_s, most_bytes=front.stream_kept_bytes)


class FrontReplica:
    """The front as a Serve ingress; `cluster.launchers.ray` decorates it with `serve.ingress()`."""

    async def __init__(self, spec_json: str) -> None:  # type: ignore[misc]  # Serve awaits it
        from cluster.pools import ServeHold

        self._spec = FrontSpec.model_validate_json(spec_json)
        configure_logging(level=self._spec.config.telemetry.log_level, process="front")
        self._service = open_service(self._spec, hold=ServeHold())
        self._app = build_app(self._spec, self._service)
        self._exporter = open_exporter(self._spec, self._app)

    def __serve_build_asgi_app__(self) -> Any:
        return self._app

    async def __del__(self) -> None:
        self._exporter.close()
        await self._service.close()
        await self._app.state.penstock.telemetry.tracer.close()


def _shared_socket(host: str, port: int) -> socket.socket:
    """The kernel spreads new connections over the front processes that listen on one port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    listening.bind((host, port))
    listening.set_inheritable(True)
    return listening


async def _serve(spec: FrontSpec) -> None:
    import uvicorn

    from cluster.connection import bounded

    service = open_service(spec)
    front = spec.config.front
    app = build_app(spec, service)
    exporter = open_exporter(spec, app)
    # The app's own start would do it; a failure there ends the process without our sentence.
    await app.state.batch.start()
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            host=front.host,
            port=front.port,
            log_config=None,
            access_log=False,
            http=cast(Any, bounded(front)),
            ssl_certfile=front.tls_cert,
            ssl_keyfile=front.tls_key,
            timeout_graceful_shutdown=2,
        )
    )
    shared = [_shared_socket(front.host, front.port)] if front.replicas > 1 else None
    serving = asyncio.create_task(server.serve(shared))
    # uvicorn has no event for this.
    while not server.started and not serving.done():  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    if server.started:
        print(f"ready {front.host}:{front.port}", flush=True)
    await serving
    exporter.close()
    await service.close()
    await app.state.penstock.telemetry.tracer.close()


def main() -> int:
    """Spec as the first line of stdin; ends when stdin ends, because then the launcher is gone."""
    spec = FrontSpec.model_validate_json(sys.stdin.readline())

    def leash() -> None:
        while sys.stdin.read(4096):
            continue
        os._exit(0)

    threading.Thread(target=leash, daemon=True).start()
    import uvloop

    configure_logging(level=spec.config.telemetry.log_level, process="front")

    try:
        uvloop.run(_serve(spec))
    except PenstockError as error:
        print(f"error: {error.message}", file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
