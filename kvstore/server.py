"""The store node as a gRPC server: KvStore, Directory and health on one port."""

from __future__ import annotations

import asyncio
import time
import uuid
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health

from kvstore import admin, directory, service
from kvstore.config import StoreConfig
from kvstore.contracts import Index
from kvstore.data.port import DataPort, host_and_port
from kvstore.data.tickets import Tickets
from kvstore.disk.open import disk_folder
from kvstore.epoch import next_epoch
from kvstore.events import EventService
from kvstore.index.embedded import EmbeddedIndex
from kvstore.index.redis import RedisIndex
from kvstore.meters import store_meters
from kvstore.node import StoreNode
from penstock import sockets, transport
from penstock.allocator import keep_freed_memory
from penstock.errors import IndexUnavailableError, UsageError
from penstock.peers import ALONE, Peers
from penstock.telemetry import catalog as M
from penstock.telemetry.exporter import HttpExporter, metrics_handler
from penstock.telemetry.otlp import open_tracer
from penstock.telemetry.trace import Tracer
from penstock.telemetry_spec import QUIET, TelemetrySpec

_STOP_GRACE_S = 1.0
TICKET_S = 4.0
"""Bytes that are reserved for a writer who never comes return after so long."""


class StoreServer:
    """One running node. Made by `start_server`; `stop` may be called again."""

    def __init__(
        self,
        node: StoreNode,
        index: Index,
        server: Any,
        address: str,
        exporter: HttpExporter,
        tracer: Tracer,
        port: DataPort | None,
    ) -> None:
        self.node = node
        self.port = port
        self.address = address
        self._index = index
        self._server = server
        self._exporter = exporter
        self._tracer = tracer
        self._health: Any = health.HealthServicer()
        self._announcing: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Serve from now on. Raises IndexUnavailableError if the index cannot be reached."""
        announcer = self.node.announcer
        if announcer is not None:
            await announcer.hello(self.address)
            self._announcing = asyncio.create_task(announcer.run(self.address))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        await self._server.start()
        if self.port is not None:
            self.port.start()
        for name in ("", service.SERVICE, directory.SERVICE):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        self._exporter.start()

    async def stop(self, grace_s: float = _STOP_GRACE_S) -> None:
        """Refuse new calls, give running ones `grace_s`, then end."""
        self._exporter.close()
        self.node.feed.close()
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)
        if self.port is not None:
            self.port.stop()
        if self._announcing is not None:
            self._announcing.cancel()
            await asyncio.gather(self._announcing, return_exceptions=True)
            self._announcing = None
        await self._index.close()
        await self.node.close()
        await self._tracer.close()


async def start_server(
    config: StoreConfig, peers: Peers = ALONE, telemetry: TelemetrySpec = QUIET
) -> StoreServer:
    """A node that serves on `.address` (its real port) those that `peers` admits.

    Raises UsageError for an address that cannot be bound, unreadable certificates or a disk folder
    that cannot be used, IndexUnavailableError for a Redis that does not answer.
    """
    keep_freed_memory()
    gates = transport.gates(peers)
    node_id = config.node_id or f"node-{uuid.uuid4().hex[:12]}"
    epoch = await asyncio.to_thread(next_epoch, disk_folder(config))
    index = open_index(config)
    node = StoreNode(config, node_id=node_id, index=index, epoch=epoch)
    workers = directory.WorkerDirectory(
        clock=time.monotonic, max_workers=config.max_workers, max_ttl_s=config.max_worker_ttl_s
    )
    server = grpc.aio.server(
        maximum_concurrent_rpcs=config.max_concurrent_calls,
        options=_options(config),
        interceptors=gates,
    )
    tickets = Tickets(TICKET_S)
    port: DataPort | None = None
    if config.data_connections:
        port = DataPort(config, tickets, secure=sockets.server_context(peers))
    meters = store_meters(node, port)
    if port is not None:
        port.on_refused(lambda reason: meters.add(M.STORE_DATA_REFUSED, reason=reason))
    tracer = open_tracer(telemetry, process="store", instance=node_id)
    server.add_generic_rpc_handlers(
        (
            service.KvStoreService(node, tickets, tracer, port).handlers(),
            EventService(node.feed, config, node_id=node_id, epoch=node.epoch).handlers(),
            directory.DirectoryService(workers, epoch=node.epoch).handlers(),
            admin.AdminService(node).handlers(),
            metrics_handler(meters),
        )
    )
    running: StoreServer | None = None
    try:
        await node.start()
        exporter = HttpExporter(meters, telemetry)
        address = _bind(server, config.listen, peers)
        running = StoreServer(node, index, server, address, exporter, tracer, port)
        await running.start()
    except (UsageError, IndexUnavailableError) as error:
        await server.stop(None)
        if port is not None:
            port.stop()
        await index.close()
        await node.close()
        if isinstance(error, UsageError):
            raise
        # Later the node does without it; at the start a wrong address must not go unnoticed.
        raise IndexUnavailableError(
            f"{error.message}; start Redis there, correct --redis-url, or leave it out: then the "
            "store keeps the index itself"
        ) from error
    return running


def open_index(config: StoreConfig) -> Index:
    if config.redis_url is None:
        return EmbeddedIndex()
    return RedisIndex(config.redis_url, entry_ttl_s=config.index_entry_ttl_s)


def _bind(server: Any, listen: str, peers: Peers) -> str:
    """The address in use, with the real port."""
    host = listen.rpartition(":")[0]
    host_and_port(listen)
    try:
        bound = transport.bind(peers, server, listen)
    except RuntimeError as error:
        raise UsageError(f"the store cannot listen on {listen}: is the port taken?") from error
    return f"{host}:{bound}"


def _options(config: StoreConfig) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", config.max_message_bytes),
        ("grpc.max_send_message_length", config.max_message_bytes),
        # Two nodes on one port would each see half of the calls.
        ("grpc.so_reuseport", 0),
        # A peer that vanished without a word must not keep reservations and pins.
        ("grpc.keepalive_time_ms", 10_000),
        ("grpc.keepalive_timeout_ms", 5_000),
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
        ("grpc.http2.max_ping_strikes", 0),
        ("grpc.keepalive_permit_without_calls", 1),
    ]
