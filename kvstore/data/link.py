"""A data connection: a blocking socket, plain or TLS, with a deadline on every step.

Used by one thread at a time; `close` from any. Python's sockets let go of the interpreter lock
while they copy, so threads move bytes beside the event loop.
"""

from __future__ import annotations

import select
import socket
import ssl
import time
from collections.abc import Sequence
from contextlib import suppress


class LinkError(Exception):
    """The connection is of no more use. `reason` is a word for a metric."""

    def __init__(self, reason: str, what: str) -> None:
        super().__init__(what)
        self.reason = reason


class Link:
    """Takes over a connected socket."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._secure = False
        with suppress(OSError):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def secure(
        self, context: ssl.SSLContext, timeout_s: float, *, server_name: str | None = None
    ) -> None:
        """TLS from now on; `server_name`: this is the client, and expects it. Raises LinkError."""
        try:
            self._socket.settimeout(timeout_s)
            self._socket = context.wrap_socket(
                self._socket, server_side=server_name is None, server_hostname=server_name
            )
            self._secure = True
        except (OSError, ValueError) as error:
            raise LinkError("tls", f"no TLS with the peer ({error})") from error

    def receive(self, into: memoryview, timeout_s: float) -> None:
        """Fills `into`, all of it within `timeout_s`. Raises LinkError."""
        deadline = time.monotonic() + timeout_s
        while len(into):
            got = self._receive_some(into, deadline - time.monotonic())
            if not got:
                raise LinkError("cut", "the peer has closed the connection")
            into = into[got:]

    def receive_first(self, into: memoryview, timeout_s: float) -> bool:
        """As `receive`; False if the peer has closed the connection before the first byte."""
        got = self._receive_some(into, timeout_s)
        if got:
            self.receive(into[got:], timeout_s)
        return bool(got)

    def send(self, parts: Sequence[memoryview], timeout_s: float) -> None:
        """All parts, one after the other, within `timeout_s`. Raises LinkError."""
        deadline = time.monotonic() + timeout_s
        left = [part for part in parts if len(part)]
        try:
            while left:
                self._socket.settimeout(max(1e-6, deadline - time.monotonic()))
                if self._secure:
                    sent = self._socket.send(left[0])
                else:
                    sent = self._socket.sendmsg(left)
                while left and sent >= len(left[0]):
                    sent -= len(left.pop(0))
                if left:
                    left[0] = left[0][sent:]
        except TimeoutError as error:
            raise LinkError("silent", "the peer takes nothing") from error
        except OSError as error:
            raise LinkError("cut", f"the connection failed ({error})") from error

    @property
    def is_quiet(self) -> bool:
        """Nothing has come, not even an end: it can be used for the next request."""
        poll = select.poll()
        try:
            poll.register(self._socket, select.POLLIN)
            return not poll.poll(0)
        except (OSError, ValueError):
            return False

    def close(self) -> None:
        """Whoever waits in it gets LinkError. May be called again."""
        with suppress(OSError):
            # Not ssl's own, which is no business of another thread.
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def end(self) -> None:
        """`close`, by the thread that uses it, and its descriptor given back."""
        self.close()
        with suppress(OSError):
            self._socket.close()

    def _receive_some(self, into: memoryview, timeout_s: float) -> int:
        try:
            self._socket.settimeout(max(1e-6, timeout_s))
            return self._socket.recv_into(into)
        except TimeoutError as error:
            raise LinkError("silent", "the peer sent nothing in time") from error
        except (OSError, ValueError) as error:
            raise LinkError("cut", f"the connection failed ({error})") from error
