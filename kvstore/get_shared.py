"""The reader's side of Get: a message read ahead, and objects copied from the node's memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import suppress
from typing import Any

import grpc

from kvstore.arena import ArenaReader, host_identity
from kvstore.buffers import Buffers
from kvstore.codec import digest_now
from protos.penstock.kv.v1 import kv_pb2

COPY_BYTES = 4 << 20
"""Shared memory that is copied and hashed in one piece of work."""


class SharedReader:
    """A client's hold on the memory of the node that it reads from."""

    def __init__(self, buffers: Buffers, *, is_on: bool) -> None:
        self.host = host_identity() if is_on else b""
        """What to say in a request; empty if the node's memory cannot be opened."""
        self._arena: ArenaReader | None = None
        self._buffers = buffers

    def open(self, shared: kv_pb2.GetShared) -> ArenaReader | None:
        """The memory that holds the objects of `shared`."""
        if self._arena is not None and self._arena.secret == shared.secret:
            return self._arena
        self.close()
        try:
            self._arena = ArenaReader(shared.pid, shared.fd, shared.secret, self._buffers)
        except OSError:
            # Another container or user after all, or the node has ended: do without from now on.
            self.host = b""
        return self._arena

    def close(self) -> None:
        """May be called again."""
        arena, self._arena = self._arena, None
        if arena is not None:
            arena.close()


async def copies(
    arena: ArenaReader, tickets: Sequence[kv_pb2.SharedObject], most_bytes: int
) -> AsyncGenerator[memoryview | None, None]:
    """Each object's bytes as `copy_verified` has them; the next ones are copied meanwhile."""
    batches = batches_of([ticket.size_bytes for ticket in tickets], most_bytes=COPY_BYTES)

    def start(batch: range) -> asyncio.Task[list[memoryview | None]]:
        some = tickets[batch.start : batch.stop]
        return asyncio.create_task(asyncio.to_thread(copy_verified, arena, some, most_bytes))

    copying = start(batches[0])
    try:
        for following in [*batches[1:], None]:
            copied = await copying
            if following is not None:
                copying = start(following)
            for raw in copied:
                yield raw
    finally:
        copying.cancel()
        await asyncio.gather(copying, return_exceptions=True)


def copy_verified(
    arena: ArenaReader, tickets: Sequence[kv_pb2.SharedObject], most_bytes: int
) -> list[memoryview | None]:
    """Each object's bytes; None where they are not those of its digest, or too many."""
    copies: list[memoryview | None] = []
    for ticket in tickets:
        raw = None
        if ticket.size_bytes <= most_bytes:
            with suppress(OSError):
                raw = arena.copy(ticket.offset, ticket.size_bytes)
        copies.append(raw if raw is not None and digest_now(raw) == ticket.digest else None)
    return copies


def batches_of(sizes: Sequence[int], *, most_bytes: int) -> list[range]:
    """Places of what is copied in one piece of work: `most_bytes` at most, or one object."""
    batches: list[range] = []
    first = total = 0
    for place, size in enumerate(sizes):
        if place > first and total + size > most_bytes:
            batches.append(range(first, place))
            first, total = place, 0
        total += size
    return [*batches, range(first, len(sizes))]


class ReadAhead:
    """Reads a Get stream one message ahead: it arrives while the one before it is verified."""

    def __init__(self, call: Any) -> None:
        self.call = call
        self._next = asyncio.ensure_future(call.read())

    async def read(self) -> Any:
        message = await self._next
        if message is not grpc.aio.EOF:
            self._next = asyncio.ensure_future(self.call.read())
        return message

    async def close(self) -> None:
        self._next.cancel()
        await asyncio.gather(self._next, return_exceptions=True)
