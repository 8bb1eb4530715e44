"""The reader's side of the data port: a ticket's objects, received and verified in a thread."""

from __future__ import annotations

import asyncio
import threading
from contextlib import suppress
from dataclasses import dataclass

from blake3 import blake3

from kvstore.buffers import Buffers
from kvstore.data.dialer import Dialer
from kvstore.data.frames import CHUNK_BYTES, What, receive_chunk, send_request
from kvstore.data.link import Link, LinkError
from protos.penstock.kv.v1 import kv_pb2

AHEAD_BYTES = 64 << 20
"""Most received bytes that wait to be taken, unless one object alone has more."""
_LOOK_S = 1.0
"""A thread that waits looks so often whether its client still exists."""


@dataclass
class Half:
    """The first bytes of an object whose transfer was cut; each chunk's XXH3 was compared."""

    id: bytes
    digest: bytes
    raw: memoryview
    filled: int


class Fetch:
    """One ticket. Made on the event loop; `close` always, which stops what is still coming."""

    def __init__(
        self,
        dialer: Dialer,
        ticket: kv_pb2.GetTicket,
        buffers: Buffers,
        *,
        most_bytes: int,
        timeout_s: float,
        half: Half | None = None,
    ) -> None:
        """`most_bytes`: larger objects are read past. `half`: what the ticket's `start` means."""
        self._dialer = dialer
        self._ticket = ticket
        self._buffers = buffers
        self._most_bytes = most_bytes
        self._timeout_s = timeout_s
        self.half = half
        """What came of the object at which the connection failed."""
        self._loop = asyncio.get_running_loop()
        self._received: asyncio.Queue[memoryview | Exception | None] = asyncio.Queue()
        self._room = threading.Condition()
        self._waiting: list[int] = []
        self._closed = False
        self._link: Link | None = None

    def start(self) -> bool:
        """False if all connections are busy."""
        return self._dialer.start(self._run)

    async def next(self) -> memoryview | None:
        """The next object's bytes; None if they are not those of its digest. Raises LinkError."""
        got = await self._received.get()
        if isinstance(got, Exception):
            raise got
        with self._room:
            self._waiting.pop(0)
            self._room.notify()
        return got

    def close(self) -> None:
        with self._room:
            self._closed = True
            self._room.notify()
            link = self._link
        if link is not None:
            link.close()

    def _run(self) -> None:
        link: Link | None = None
        try:
            link = self._dialer.open(self._ticket.port)
            with self._room:
                self._check_wanted()
                self._link = link
            send_request(link, What.GET, self._ticket.ticket, self._timeout_s)
            for place, ticket in enumerate(self._ticket.objects):
                self._await_room(ticket.size_bytes)
                self._post(self._receive(link, ticket, self._ticket.start if place == 0 else 0))
            with self._room:
                self._link = None
            self._dialer.keep(self._ticket.port, link)
            link = None
        except Exception as error:
            self._post(error)
        finally:
            if link is not None:
                with self._room:
                    self._link = None
                link.end()

    def _receive(self, link: Link, ticket: kv_pb2.TicketObject, start: int) -> memoryview | None:
        half, self.half = self.half, None
        if ticket.size_bytes > self._most_bytes or start >= max(1, ticket.size_bytes):
            self._read_past(link, ticket.size_bytes - start)
            return None
        hasher = blake3()
        if start:
            if half is None or half.id != ticket.id or half.filled != start:
                raise LinkError("garbage", "a ticket starts where nothing was cut")
            raw = half.raw
            hasher.update(raw[:start])
        else:
            raw = self._buffers.new(ticket.size_bytes)
        self.half = half = Half(ticket.id, ticket.digest, raw, start)
        while half.filled < len(raw):
            chunk = receive_chunk(link, raw[half.filled :], self._timeout_s)
            half.filled += len(chunk)
            hasher.update(chunk)
        self.half = None
        return raw if hasher.digest() == ticket.digest else None

    def _read_past(self, link: Link, left: int) -> None:
        room = memoryview(bytearray(CHUNK_BYTES))
        while left > 0:
            left -= len(receive_chunk(link, room[: min(left, CHUNK_BYTES)], self._timeout_s))

    def _await_room(self, size_bytes: int) -> None:
        with self._room:
            while self._waiting and sum(self._waiting) + size_bytes > AHEAD_BYTES:
                self._check_wanted()
                self._room.wait(_LOOK_S)
            self._check_wanted()
            self._waiting.append(size_bytes)

    def _check_wanted(self) -> None:
        if self._closed or self._dialer.is_closed:
            raise LinkError("cut", "nobody waits for it any more")

    def _post(self, what: memoryview | Exception | None) -> None:
        # A loop that has ended takes its reader with it.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._received.put_nowait, what)
