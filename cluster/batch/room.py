"""Puts batch jobs together: journal, runner, gRPC server. One per front process."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import SERVICE_NAME as HEALTH
from grpc_health.v1.health import aio as health
from grpc_reflection.v1alpha import reflection

from cluster.batch.config import BatchSection
from cluster.batch.documents import DocumentWork
from cluster.batch.lines import LINES, Inside, LineWork
from cluster.batch.pins import Pins
from cluster.batch.runner import Runner
from cluster.batch.service import BatchService
from cluster.batch.sources import Sources
from cluster.batch.spec import DOCUMENTS
from cluster.batch.surroundings import Surroundings
from kvstore.journal.contracts import Journal
from kvstore.journal.journal import open_journal
from penstock.errors import UnavailableError, UsageError
from penstock.rpc import server_options
from protos.penstock.batch.v1 import batch_pb2, batch_pb2_grpc

_log = logging.getLogger(__name__)
_STOP_GRACE_S = 1.0
_AWAIT_FILE_S = 1.0
_SERVICE = batch_pb2.DESCRIPTOR.services_by_name["Batch"].full_name
_SQLITE = "sqlite:///"


class BatchRoom:
    """`start` and `stop` inside the event loop that serves; doors call `poke` after new work."""

    def __init__(
        self,
        config: BatchSection,
        around: Surroundings,
        open_channel: Callable[[], grpc.aio.Channel],
        inside: Inside,
        *,
        journal: Journal | None = None,
    ) -> None:
        """`open_channel`: to the store node. `inside` answers lines of `/v1/batches`. Raises
        UsageError for a journal URL that cannot be one.
        """
        self.config = config
        self.around = around
        url = config.journal(around.front.port)
        self.journal = journal or open_journal(url, retention_s=config.retention_s)
        # A file that nobody asked for is made when the first job comes.
        file = Path(url.removeprefix(_SQLITE)).expanduser()
        lazy = config.journal_url is None and journal is None and not file.exists()
        self._awaited = file if lazy else None
        self._waiting: asyncio.Task[None] | None = None
        self._open_channel = open_channel
        self._inside = inside
        self._channel: grpc.aio.Channel | None = None
        self._runner: Runner | None = None
        self._server: grpc.aio.Server | None = None

    async def start(self) -> None:
        """Raises UsageError if the gRPC port cannot be bound."""
        if self._runner is not None:
            return
        config = self.config
        if config.journal_url is not None:
            await self._try_journal()
        self._channel = self._open_channel()
        sources = Sources(
            config.sources,
            max_bytes=config.max_document_bytes,
            timeout_s=config.fetch_timeout_s,
        )
        places = asyncio.Semaphore(config.max_requests)
        documents = DocumentWork(
            around=self.around,
            journal=self.journal,
            sources=sources,
            pins=Pins(self._channel, ttl_s=config.pin_s),
            places=places,
        )
        lines = LineWork(self.journal, self._inside, places)
        work = {DOCUMENTS: documents.run, LINES: lines.run}
        self._runner = Runner(
            self.journal, self.around.service, work, config, self.around.telemetry
        )
        if config.grpc_port is not None:
            service = BatchService(
                self.journal, config, sources, self.around, self.poke, self.cancelled
            )
            self._server = await self._serve(service, config.grpc_port)
        if self._awaited is None:
            self._runner.start()
        else:
            self._waiting = asyncio.create_task(self._await_file(self._awaited))

    async def _try_journal(self) -> None:
        """A journal that can never work is named now; one that is away for a moment is waited for
        by whoever needs it.
        """
        try:
            await self.journal.list_jobs("", limit=1)
        except UnavailableError as error:
            _log.warning("%s", error.message)

    async def _await_file(self, file: Path) -> None:
        """Another front of this machine may be the one that makes it."""
        while not await asyncio.to_thread(file.exists):  # noqa: ASYNC110
            await asyncio.sleep(_AWAIT_FILE_S)
        self.poke()

    def poke(self) -> None:
        """There may be new work."""
        if self._runner is not None:
            self._runner.start()
            self._runner.poke()

    def cancelled(self, job_id: str) -> None:
        """Its work here is not wanted any more."""
        if self._runner is not None:
            self._runner.cancel(job_id)

    async def stop(self) -> None:
        """Give back what is in work, close everything. May be called again."""
        server, self._server = self._server, None
        if server is not None:
            await server.stop(_STOP_GRACE_S)
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
        runner, self._runner = self._runner, None
        if runner is not None:
            await runner.stop()
        await self.journal.close()
        channel, self._channel = self._channel, None
        if channel is not None:
            await channel.close()

    async def _serve(self, service: BatchService, port: int) -> grpc.aio.Server:
        front = self.around.front
        server = grpc.aio.server(
            options=[
                *server_options(),
                # Several fronts of one machine share the port: any of them can serve any call.
                ("grpc.so_reuseport", int(front.replicas > 1)),
            ],
        )
        batch_pb2_grpc.add_BatchServicer_to_server(service, server)
        checks = health.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(checks, server)
        reflection.enable_server_reflection((_SERVICE, HEALTH, reflection.SERVICE_NAME), server)
        host = f"[{front.host}]" if ":" in front.host else front.host
        try:
            if front.tls_cert is not None and front.tls_key is not None:
                pair = await asyncio.to_thread(_read_pair, front.tls_key, front.tls_cert)
                server.add_secure_port(f"{host}:{port}", grpc.ssl_server_credentials([pair]))
            else:
                server.add_insecure_port(f"{host}:{port}")
        except RuntimeError as error:
            raise UsageError(
                f"the batch service cannot listen on {host}:{port}; choose another --grpc-port"
            ) from error
        await server.start()
        for name in ("", _SERVICE):
            await checks.set(name, health_pb2.HealthCheckResponse.SERVING)
        _log.info("the batch service listens on %s:%d", host, port)
        return server


def _read_pair(key: str, certificate: str) -> tuple[bytes, bytes]:
    return Path(key).read_bytes(), Path(certificate).read_bytes()
