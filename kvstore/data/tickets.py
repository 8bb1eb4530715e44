"""What a data connection may do: tickets that gRPC hands out, each for one piece of work, once."""

from __future__ import annotations

import asyncio
import secrets
import threading
from typing import Protocol

from kvstore.data.frames import TICKET_BYTES, What
from kvstore.data.link import Link


class Work(Protocol):
    """What a ticket stands for. `run` belongs to a connection's thread, `give_up` to the loop."""

    @property
    def what(self) -> What: ...

    def run(self, link: Link) -> None:
        """Move the bytes. Raises LinkError; whatever happens, what the work holds is given back."""

    def give_up(self) -> None:
        """Nobody came for it: give back what it holds. May be called again."""


class Tickets:
    """Open tickets of one node. Belongs to its loop but for `take`."""

    def __init__(self, ttl_s: float) -> None:
        self._ttl_s = ttl_s
        self._lock = threading.Lock()
        self._open: dict[bytes, Work] = {}
        self._timers: dict[bytes, asyncio.TimerHandle] = {}

    def __len__(self) -> int:
        return len(self._open)

    def issue(self, work: Work) -> bytes:
        """A ticket for `work`, good for a few seconds."""
        ticket = secrets.token_bytes(TICKET_BYTES)
        with self._lock:
            self._open[ticket] = work
        loop = asyncio.get_running_loop()
        self._timers[ticket] = loop.call_later(self._ttl_s, self.withdraw, ticket)
        return ticket

    def take(self, ticket: bytes, what: What) -> Work | None:
        """Its work, if it is open and for that; it is used up. From any thread."""
        with self._lock:
            work = self._open.get(ticket)
            if work is None or work.what is not what:
                return None
            return self._open.pop(ticket)

    def withdraw(self, ticket: bytes) -> None:
        """Unless it was taken, its work is given up. May be called again."""
        timer = self._timers.pop(ticket, None)
        if timer is not None:
            timer.cancel()
        with self._lock:
            work = self._open.pop(ticket, None)
        if work is not None:
            work.give_up()

    def close(self) -> None:
        for ticket in list(self._timers):
            self.withdraw(ticket)
