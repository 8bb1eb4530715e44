"""One HTTP connection of a front, bounded where uvicorn is not: how long and how large a request's
head may be, how long a client may leave an answer unread, how many connections there are.

Ray Serve's own proxy is not built with this: behind `--launcher ray` these four are an ingress's to
set (docs/limits.md).
"""

from __future__ import annotations

import asyncio
import functools
from typing import TYPE_CHECKING, Any

import orjson
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

if TYPE_CHECKING:
    from collections.abc import Callable

    from cluster.config import FrontSection


def bounded(front: FrontSection) -> Callable[..., asyncio.Protocol]:
    """For `uvicorn.Config(http=...)`."""
    return functools.partial(BoundedProtocol, front=front)


class BoundedProtocol(HttpToolsProtocol):
    """`HttpToolsProtocol` with a clock on heads and on unread answers."""

    def __init__(self, *args: Any, front: FrontSection, **more: Any) -> None:
        super().__init__(*args, **more)
        self._front = front
        self._head_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None
        self._in_head = True
        self._untouched = True
        """Nothing of the head that is awaited has come."""
        self._head_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self._front.max_connections:
            self._refuse(503, "too_many_connections", "this server has no connection to spare")
            return
        # The first head: a connection that never says anything must end too.
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_head_timer()
        self._stop_stall_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        self._untouched = False
        super().data_received(data)
        if self.transport.is_closing():
            return
        if not self._in_head:
            return
        self._head_bytes += len(data)
        if self._head_bytes > self._front.max_header_bytes and not self._untouched:
            self._too_large()
        elif not self._untouched:
            self._await_head()

    def on_message_begin(self) -> None:
        self._untouched = False
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._head_bytes = 0
        self._stop_head_timer()
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > self._front.max_header_bytes:
            self._too_large()
            return
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if not self.transport.is_closing():
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._in_head = self._untouched = True
        self._head_bytes = 0
        self._stop_head_timer()
        if not self.transport.is_closing():
            super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self._in_head and not self.transport.is_closing():
            # Answered before the body was whole. Closed at once, its sender would meet a reset in
            # place of the answer; left alone, it could send for ever.
            self._await_head()

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, "invalid_http", "the bytes are no HTTP request")

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._stall_timer is None:
            # Aborted, not closed: closing would wait for the bytes that nobody reads.
            self._stall_timer = self.loop.call_later(
                self._front.write_stall_s, self.transport.abort
            )

    def resume_writing(self) -> None:
        self._stop_stall_timer()
        super().resume_writing()

    def _await_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(self._front.header_timeout_s, self._late)

    def _late(self) -> None:
        self._head_timer = None
        if self._untouched or not self._in_head:
            self.transport.close()
            return
        seconds = self._front.header_timeout_s
        self._refuse(
            408,
            "request_timeout",
            f"the request's headers were not complete after {seconds:g} s",
        )

    def _too_large(self) -> None:
        limit = self._front.max_header_bytes
        self._refuse(
            431,
            "headers_too_large",
            f"the request's line and headers are larger than {limit} bytes, the limit of this "
            "server",
        )

    def _refuse(self, status: int, code: str, message: str) -> None:
        """Says why and hangs up; in the middle of an answer only hangs up."""
        self._stop_head_timer()
        if self.cycle is None or self.cycle.response_complete:
            kind = "server_error" if status >= 500 else "invalid_request_error"
            error = {"message": message, "type": kind, "param": None, "code": code}
            content = orjson.dumps({"error": error})
            head = (
                b"content-type: application/json\r\n"
                b"content-length: %d\r\nconnection: close\r\n\r\n" % len(content)
            )
            self.transport.write(STATUS_LINE[status] + head + content)
        self.transport.close()

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _stop_stall_timer(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None
