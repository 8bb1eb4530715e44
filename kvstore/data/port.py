"""The node's data port: who presents a ticket is served, whoever else is hung up on.

A thread a connection, at most `data_connections`. Nothing is sent before a ticket was found, so a
stranger learns that a port is open and no more.
"""

from __future__ import annotations

import logging
import socket
import ssl
import threading
from collections.abc import Callable
from contextlib import suppress

from kvstore.config import StoreConfig
from kvstore.data.frames import receive_request
from kvstore.data.link import Link, LinkError
from kvstore.data.tickets import Tickets
from penstock.errors import UsageError

_LOG = logging.getLogger(__name__)
HELLO_S = 5.0
"""For a TLS handshake, the first request of a connection, and the rest of any."""
IDLE_S = 60.0
"""A connection on which no request comes for so long is closed."""
_BACKLOG = 64

Refused = Callable[[str], None]


class DataPort:
    """Listens from the start, and serves from `start` on."""

    def __init__(
        self, config: StoreConfig, tickets: Tickets, *, secure: ssl.SSLContext | None
    ) -> None:
        """Raises UsageError for an address that cannot be bound."""
        self.tickets = tickets
        self._most = config.data_connections
        self._secure = secure
        self._refused: Refused = lambda reason: None
        self._lock = threading.Lock()
        self._links: set[Link] = set()
        self._stopped = False
        host, port = _place(config)
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            self._listener = socket.create_server(
                (host, port), family=family, backlog=_BACKLOG, reuse_port=False
            )
        except OSError as error:
            raise UsageError(
                f"the store's data port cannot listen on {host}:{port} ({error.strerror}); name "
                "another one (kvstore.data_listen), or none (kvstore.data_connections: 0)"
            ) from error
        self.port = int(self._listener.getsockname()[1])
        self._accepting = threading.Thread(target=self._accept, name="kv-data", daemon=True)

    def on_refused(self, refused: Refused) -> None:
        """`refused` is told by a word why a peer was hung up on, from any thread."""
        self._refused = refused

    def start(self) -> None:
        self._accepting.start()

    def stop(self) -> None:
        """Ends every connection. May be called again."""
        self._stopped = True
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            links = list(self._links)
        for link in links:
            link.close()
        self.tickets.close()

    @property
    def connections(self) -> int:
        return len(self._links)

    def _accept(self) -> None:
        while not self._stopped:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                if self._stopped:
                    return
                # Out of descriptors, or a peer that has gone already.
                threading.Event().wait(0.05)
                continue
            if len(self._links) >= self._most:
                self._refused("full")
                connection.close()
                continue
            link = Link(connection)
            with self._lock:
                self._links.add(link)
            threading.Thread(target=self._serve, args=(link,), name="kv-data", daemon=True).start()

    def _serve(self, link: Link) -> None:
        patience_s = HELLO_S
        try:
            if self._secure is not None:
                link.secure(self._secure, HELLO_S)
            while not self._stopped:
                request = receive_request(link, patience_s, HELLO_S)
                if request is None:
                    return
                work = self.tickets.take(request[1], request[0])
                if work is None:
                    raise LinkError("ticket", "a peer's ticket is not, or no more, good")
                work.run(link)
                patience_s = IDLE_S
        except LinkError as error:
            if patience_s == HELLO_S or error.reason != "silent":
                self._refused(error.reason)
            _LOG.debug("data connection ended: %s", error)
        finally:
            with self._lock:
                self._links.discard(link)
            link.end()


def _place(config: StoreConfig) -> tuple[str, int]:
    """Host and port to listen on: the host of gRPC's, and a free port, unless one is named."""
    if not config.data_listen:
        return host_and_port(config.listen)[0], 0
    try:
        return host_and_port(config.data_listen)
    except UsageError as error:
        raise UsageError(f"kvstore.data_listen: {error.message}") from error


def host_and_port(listen: str) -> tuple[str, int]:
    """Raises UsageError unless it is HOST:PORT."""
    host, colon, port = listen.rpartition(":")
    if not colon or not host or not port.isdigit():
        raise UsageError(f"the store cannot listen on {listen!r}: it must be HOST:PORT")
    return host.strip("[]"), int(port)
