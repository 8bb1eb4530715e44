"""A client's connections to the data port of its node: kept open, few, and given up for a while
when they fail.
"""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from kvstore.data.link import Link, LinkError
from penstock.peers import ALONE, PEER_NAME, Peers
from penstock.sockets import client_context

MOST_LINKS = 8
"""Connections of one client at once, a thread each; whoever finds none uses gRPC."""
_CONNECT_S = 1.0
_REST_S = (1.0, 60.0)
"""How long gRPC alone is used after a failure: doubled with each in a row."""


class Dialer:
    """Safe from any thread. `close` may be called again."""

    def __init__(
        self,
        address: str,
        peers: Peers = ALONE,
        *,
        is_on: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`address`: gRPC's, whose host is the data port's too. Raises UsageError for TLS files."""
        host, _, port = address.rpartition(":")
        self._host = host.rpartition("/")[2].strip("[]")
        self._is_on = is_on and bool(self._host) and port.isdigit()
        self._secure: ssl.SSLContext | None = client_context(peers) if self._is_on else None
        self._clock = clock
        self._lock = threading.Lock()
        self._idle: dict[int, list[Link]] = {}
        self._busy = 0
        self._rest_s = 0.0
        self._resting_until = 0.0
        self._closed = False
        self._threads = ThreadPoolExecutor(MOST_LINKS, thread_name_prefix="kv-data")

    @property
    def is_usable(self) -> bool:
        """Worth asking the node for a ticket."""
        return self._is_on and not self._closed and self._clock() >= self._resting_until

    @property
    def is_closed(self) -> bool:
        return self._closed

    def start(self, work: Callable[[], None]) -> bool:
        """`work` in a thread of its own, with one connection; False if all are busy."""
        with self._lock:
            if self._closed or self._busy >= MOST_LINKS:
                return False
            self._busy += 1
        try:
            self._threads.submit(self._run, work)
        except RuntimeError:
            with self._lock:
                self._busy -= 1
            return False
        return True

    def open(self, port: int) -> Link:
        """A connection to `port`, kept or new. Raises LinkError. Blocks for a second at most."""
        while True:
            with self._lock:
                idle = self._idle.get(port)
                link = idle.pop() if idle else None
            if link is None:
                return self._connect(port)
            if link.is_quiet:
                return link
            link.end()

    def keep(self, port: int, link: Link) -> None:
        """For the next one: nothing is on its way there."""
        with self._lock:
            self._rest_s = 0.0
            # A node that came back has another port: connections to the old one are dead.
            stale = [one for old, links in self._idle.items() if old != port for one in links]
            self._idle = {port: self._idle.get(port, [])}
            if self._closed:
                stale.append(link)
            else:
                self._idle[port].append(link)
        for one in stale:
            one.end()

    def failed(self) -> None:
        """gRPC alone for a while."""
        with self._lock:
            self._rest_s = min(max(_REST_S[0], 2 * self._rest_s), _REST_S[1])
            self._resting_until = self._clock() + self._rest_s

    def close(self) -> None:
        with self._lock:
            self._closed = True
            links = [link for idle in self._idle.values() for link in idle]
            self._idle = {}
        for link in links:
            link.end()
        self._threads.shutdown(wait=False)

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        finally:
            with self._lock:
                self._busy -= 1

    def _connect(self, port: int) -> Link:
        try:
            link = Link(socket.create_connection((self._host, port), timeout=_CONNECT_S))
        except OSError as error:
            raise LinkError("unreachable", f"the data port cannot be reached ({error})") from error
        if self._secure is not None:
            try:
                link.secure(self._secure, _CONNECT_S, server_name=PEER_NAME)
            except LinkError:
                link.end()
                raise
        return link
