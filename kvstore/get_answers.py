"""The node's side of a Get: each object as bytes, as a place in shared memory, or by a ticket."""

from __future__ import annotations

import asyncio
import os
from collections import deque
from typing import Any

from kvstore.arena import LEAST_BYTES
from kvstore.data.port import DataPort
from kvstore.data.work import SendWork
from kvstore.node import StoreNode
from kvstore.transfer import OpenGet
from kvstore.wire import encode_data, encode_first, slices
from penstock.errors import DeadlineError
from penstock.telemetry import trace
from protos.penstock.kv.v1 import kv_pb2

_SHARED_PER_MESSAGE = 64
_TICKET_OBJECTS = 64
_TICKET_BYTES = 64 << 20
"""Most bytes of a ticket's objects, unless one alone is larger."""
_OPEN_TICKETS = 2
"""Tickets of one Get at once: their objects are held."""


class GetAnswers:
    """One Get call. Belongs to the node's event loop."""

    def __init__(
        self, node: StoreNode, request: kv_pb2.GetRequest, context: Any, *, is_near: bool
    ) -> None:
        """`is_near`: the reader can open this process's memory."""
        self._node = node
        self._request = request
        self._context = context
        self._is_near = is_near
        self._port: DataPort | None = None
        self._shared = kv_pb2.GetShared()
        self._waiting: list[tuple[bytes, OpenGet]] = []
        self._start = 0
        self._tickets: deque[tuple[bytes, SendWork]] = deque()

    async def send(self, port: DataPort | None) -> None:
        """All objects, in order. `port`: where the reader may fetch them."""
        request = self._request
        self._port = port if request.data_port else None
        ttl_s, wait_s = request.lease_ttl_ms / 1000, request.wait_ms / 1000
        # All that is there is leased before the first byte is sent: the tail of a long prefix
        # cannot be evicted while its head is on the way.
        self._node.lease(request.ids, owner=request.owner, ttl_s=ttl_s)
        trace.note(ids=len(request.ids), wait_ms=request.wait_ms)
        try:
            for place, id_ in enumerate(request.ids):
                if self._is_holding and not self._node.has([id_])[0]:
                    # What is there must not wait with what is not.
                    await self._flush()
                found = await self._node.open(id_, owner=request.owner, ttl_s=ttl_s, wait_s=wait_s)
                await self._add(id_, found, is_first=place == 0)
            await self._flush()
            while self._tickets:
                await self._tickets.popleft()[1].done.wait()
        finally:
            for _, found in self._waiting:
                found.close()
            for ticket, _ in self._tickets:
                if port is not None:
                    port.tickets.withdraw(ticket)

    @property
    def _is_holding(self) -> bool:
        return bool(self._waiting or len(self._shared.objects))

    async def _add(self, id_: bytes, found: OpenGet | None, *, is_first: bool) -> None:
        if found is None:
            await self._flush()
            missing = kv_pb2.GetResponse(missing=kv_pb2.GetMissing(id=id_))
            await self._write(missing.SerializeToString())
            return
        shared = self._node.shared(found) if self._is_near else None
        start = self._resumed(found) if is_first else 0
        if shared is not None:
            arena, offset = shared
            self._shared.fd, self._shared.secret = arena.fd, arena.secret
            self._shared.objects.add(
                id=id_, offset=offset, size_bytes=len(found.data), digest=found.digest
            )
            found.close()
            if len(self._shared.objects) == _SHARED_PER_MESSAGE:
                await self._flush()
        elif self._port is not None and len(found.data) - start >= LEAST_BYTES:
            await self._add_waiting(id_, found, start)
        else:
            try:
                await self._flush()
                await self._send_object(id_, found, start)
            finally:
                found.close()

    async def _add_waiting(self, id_: bytes, found: OpenGet, start: int) -> None:
        held = sum(len(other.data) for _, other in self._waiting)
        if self._waiting and held + len(found.data) > _TICKET_BYTES:
            try:
                await self._flush()
            except BaseException:
                found.close()
                raise
        self._start = self._start or start
        self._waiting.append((id_, found))
        if len(self._waiting) == _TICKET_OBJECTS:
            await self._flush()

    async def _flush(self) -> None:
        """Tell the reader of what it can have by now."""
        if len(self._shared.objects):
            self._shared.pid, self._shared.epoch = os.getpid(), self._node.epoch
            await self._write(kv_pb2.GetResponse(shared=self._shared).SerializeToString())
            self._shared.Clear()
        if self._waiting and self._port is not None:
            while len(self._tickets) >= _OPEN_TICKETS:
                await self._tickets[0][1].done.wait()
                self._tickets.popleft()
            waiting, self._waiting = self._waiting, []
            start, self._start = self._start, 0
            work = SendWork(
                [found for _, found in waiting],
                start=start,
                stall_s=self._node.config.get_stall_s,
            )
            ticket = self._port.tickets.issue(work)
            self._tickets.append((ticket, work))
            message = kv_pb2.GetTicket(
                ticket=ticket, port=self._port.port, epoch=self._node.epoch, start=start
            )
            for id_, found in waiting:
                message.objects.add(id=id_, size_bytes=len(found.data), digest=found.digest)
            await self._write(kv_pb2.GetResponse(ticket=message).SerializeToString())

    async def _send_object(self, id_: bytes, found: OpenGet, offset: int) -> None:
        start = kv_pb2.GetStart(
            id=id_,
            size_bytes=len(found.data),
            digest=found.digest,
            epoch=self._node.epoch,
            start=offset,
        )
        head, *rest = slices(found.data[offset:], self._node.config.chunk_bytes)
        await self._write(encode_first(start.SerializeToString(), [head]))
        for chunk in rest:
            await self._write(encode_data(chunk))

    def _resumed(self, found: OpenGet) -> int:
        """Bytes of the first object that the reader has."""
        offset = self._request.resume_offset
        is_same = self._request.resume_digest == found.digest
        return offset if is_same and offset < len(found.data) else 0

    async def _write(self, message: bytes) -> None:
        stall_s = self._node.config.get_stall_s
        try:
            async with asyncio.timeout(stall_s):
                await self._context.write(message)
        except TimeoutError:
            raise DeadlineError(f"the reader of a Get took nothing for {stall_s} s") from None
