"""What changed in the node, told to mirrors: `EventFeed`, and the RPC `KvStore.Subscribe` over it.

A subscriber gets a snapshot in parts, then the changes. Between two messages its changes are merged
by name, so what waits for it is bounded by `max_event_backlog` names; beyond that it is cut and
begins again. Names are the first 8 bytes of an id (`kvstore/mirror.py`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from typing import Any

import grpc

from kvstore.config import StoreConfig
from kvstore.mirror import NAME_BYTES
from kvstore.rpc import abort_with, parse
from penstock.errors import DeadlineError, OverloadedError, PenstockError
from protos.penstock.kv.v1 import kv_pb2

SERVICE = "penstock.kv.v1.KvStore"
PART_NAMES = 8_192
SNAPSHOTS = 8
"""At once; further subscribers wait."""
COALESCE_S = 0.02
"""Rest between two messages of changes: what comes and goes within it is never told."""


class EventFeed:
    """Changes of one node's life in order, and who listens. Belongs to the node's event loop."""

    def __init__(self, config: StoreConfig, *, ids: Callable[[], list[bytes]]) -> None:
        """`ids` reads the node's catalogues, the snapshot's truth; an id may be there twice."""
        self.seq = 0
        self._config = config
        self._ids = ids
        self._subscribers: set[Subscriber] = set()
        self._closed = False

    def __len__(self) -> int:
        return len(self._subscribers)

    def changed(self, id_: bytes, present: bool) -> None:
        """Never blocks, and costs nothing without subscribers."""
        self.seq += 1
        if self._subscribers:
            name = id_[:NAME_BYTES]
            for subscriber in self._subscribers:
                subscriber.take(name, present)

    @contextmanager
    def subscribed(self) -> Iterator[Subscriber]:
        """Raises OverloadedError beyond `max_subscribers`."""
        if self._closed:
            raise OverloadedError("the store node is shutting down")
        if len(self._subscribers) >= self._config.max_subscribers:
            raise OverloadedError(f"{self._config.max_subscribers} mirrors are subscribed already")
        subscriber = Subscriber(self._ids(), most=self._config.max_event_backlog)
        self._subscribers.add(subscriber)
        try:
            yield subscriber
        finally:
            self._subscribers.discard(subscriber)

    def close(self) -> None:
        """End all subscriptions."""
        self._closed = True
        for subscriber in self._subscribers:
            subscriber.end()


class Subscriber:
    """What one mirror has not been told yet."""

    def __init__(self, snapshot: list[bytes], *, most: int) -> None:
        self.snapshot = snapshot
        self.ended = False
        self._most = most
        self._pending: dict[bytes, bool] = {}
        self._is_cut = False
        self._wake = asyncio.Event()

    def take(self, name: bytes, present: bool) -> None:
        if self._is_cut:
            return
        self._pending[name] = present
        if len(self._pending) > self._most:
            self._pending = {}
            self._is_cut = True
        self._wake.set()

    def end(self) -> None:
        self.ended = True
        self._wake.set()

    async def changes(self, within_s: float) -> dict[bytes, bool]:
        """What changed since the last call, or nothing after `within_s`.

        Raises OverloadedError once changes had to be forgotten.
        """
        try:
            async with asyncio.timeout(within_s):
                await self._wake.wait()
        except TimeoutError:
            pass
        self._wake.clear()
        if self._is_cut:
            raise OverloadedError(
                f"more than {self._most} changes wait for this mirror; subscribe again for a "
                "snapshot"
            )
        changes, self._pending = self._pending, {}
        return changes


class EventService:
    """The RPC. One message is in flight for each subscriber."""

    def __init__(self, feed: EventFeed, config: StoreConfig, *, node_id: str, epoch: int) -> None:
        self._feed = feed
        self._config = config
        self._node_id = node_id
        self._epoch = epoch
        self._silence_s = min(config.heartbeat_s, 1.0)
        self._snapshots = asyncio.Semaphore(SNAPSHOTS)
        self._part = min(PART_NAMES, (config.max_message_bytes - 1024) // NAME_BYTES)

    def handlers(self) -> grpc.GenericRpcHandler:
        return grpc.method_handlers_generic_handler(
            SERVICE, {"Subscribe": grpc.unary_stream_rpc_method_handler(self._subscribe)}
        )

    async def _subscribe(self, raw: bytes, context: Any) -> None:
        try:
            parse(kv_pb2.SubscribeRequest, raw)
            async with AsyncExitStack() as stack:
                # A snapshot is as long as the catalogue: a few at once.
                async with self._snapshots:
                    subscriber = stack.enter_context(self._feed.subscribed())
                    told = await self._send_snapshot(subscriber, context)
                while not subscriber.ended:
                    changes = await subscriber.changes(self._silence_s)
                    seq = self._feed.seq
                    await self._send_changes(changes, told, seq, context)
                    told = seq
                    await asyncio.sleep(COALESCE_S)
        except PenstockError as error:
            await abort_with(context, error)

    async def _send_snapshot(self, subscriber: Subscriber, context: Any) -> int:
        """The `seq` that it stands for."""
        seq = self._feed.seq
        ids, subscriber.snapshot = subscriber.snapshot, []
        for start in range(0, max(1, len(ids)), self._part):
            part = kv_pb2.IndexEvents(
                stored=b"".join(id_[:NAME_BYTES] for id_ in ids[start : start + self._part]),
                snapshot=True,
                complete=start + self._part >= len(ids),
            )
            await self._send(part, seq, context)
        return seq

    async def _send_changes(
        self, changes: dict[bytes, bool], told: int, seq: int, context: Any
    ) -> None:
        """The last part reaches `seq`; those before it still stand at `told`."""
        names = list(changes.items())
        for start in range(0, max(1, len(names)), self._part):
            some = names[start : start + self._part]
            events = kv_pb2.IndexEvents(
                stored=b"".join(name for name, present in some if present),
                removed=b"".join(name for name, present in some if not present),
            )
            is_last = start + self._part >= len(names)
            await self._send(events, seq if is_last else told, context)

    async def _send(self, events: kv_pb2.IndexEvents, seq: int, context: Any) -> None:
        events.node_id, events.epoch, events.seq = self._node_id, self._epoch, seq
        try:
            async with asyncio.timeout(self._config.get_stall_s):
                await context.write(events.SerializeToString())
        except TimeoutError:
            raise DeadlineError(
                f"the mirror took nothing for {self._config.get_stall_s} s; subscribe again"
            ) from None
