"""A bad network: a TCP proxy that cuts, damages or holds up what goes through it."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

Tamper = Callable[[bytes, int], bytes | None]
"""What becomes of some bytes of one direction that begin at an offset; None: cut there."""


@dataclass
class Proxy:
    """Between any number of clients and one port of this host."""

    target: int
    to_node: Tamper = lambda data, at: data
    to_client: Tamper = lambda data, at: data
    connections: int = 0
    carried: int = 0
    _sockets: list[socket.socket] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        for one in (self._listener, *self._sockets):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self.target))
            except OSError:
                return
            self.connections += 1
            self._sockets += [near, far]
            for source, sink, tamper in (
                (near, far, lambda *a: self.to_node(*a)),
                (far, near, lambda *a: self.to_client(*a)),
            ):
                threading.Thread(
                    target=self._pump, args=(source, sink, tamper), daemon=True
                ).start()

    def _pump(self, source: socket.socket, sink: socket.socket, tamper: Tamper) -> None:
        at = 0
        with suppress(OSError):
            while data := source.recv(1 << 16):
                passed = tamper(data, at)
                if passed is None:
                    break
                at += len(data)
                self.carried += len(passed)
                sink.sendall(passed)
        for one in (source, sink):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            # What it has not read makes a reset of it, as when a peer dies.
            one.close()


@contextmanager
def proxy(target: int) -> Iterator[Proxy]:
    made = Proxy(target)
    try:
        yield made
    finally:
        made.close()


def cut_at(offset: int, *, times: int = 1) -> Tamper:
    """Passes `offset` bytes of a connection and cuts it; `times` connections, then all is well."""
    left = [times]

    def tamper(data: bytes, at: int) -> bytes | None:
        if left[0] and at + len(data) > offset:
            left[0] -= 1
            return None
        return data

    return tamper


def flip_at(offset: int) -> Tamper:
    """Flips a bit of the byte at `offset`, once."""
    done: list[int] = []

    def tamper(data: bytes, at: int) -> bytes:
        if not done and at <= offset < at + len(data):
            done.append(at)
            place = offset - at
            return data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :]
        return data

    return tamper
