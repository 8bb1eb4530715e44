"""Bounds on bodies while they come in: a time for each, a memory for all together."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from starlette.types import Message, Receive

from cluster.api.errors import HttpError
from cluster.config import FrontSection
from penstock.errors import OverloadedError

SLOWEST_BYTES_PER_S = 16 << 10
"""What has come extends a body's time at this rate: large bodies may take long, slow ones not."""


class Bodies:
    """The bodies of one front process. Belongs to its event loop."""

    def __init__(self, config: FrontSection) -> None:
        self._timeout_s = config.body_timeout_s
        self._most_bytes = config.max_bodies_bytes
        self._held_bytes = 0

    @property
    def held_bytes(self) -> int:
        """Of requests in progress."""
        return self._held_bytes

    def guard(self, receive: Receive, *, counted: bool) -> tuple[Receive, Callable[[], None]]:
        """`receive` within the bounds, and what gives the memory back (it may be called again).

        Not `counted`: what is written to disk as it comes.
        """
        body = _Body(self, receive, counted=counted)
        return body.receive, body.release

    def _take(self, size_bytes: int) -> None:
        """Raises `OverloadedError` if all bodies together would be too large."""
        if self._held_bytes + size_bytes > self._most_bytes:
            raise OverloadedError(
                f"this front holds {self._held_bytes} bytes of requests and takes at most "
                f"{self._most_bytes} (front.max_bodies_bytes)"
            )
        self._held_bytes += size_bytes

    def _give(self, size_bytes: int) -> None:
        self._held_bytes -= size_bytes


class _Body:
    """One request's."""

    def __init__(self, bodies: Bodies, receive: Receive, *, counted: bool) -> None:
        self._bodies = bodies
        self._receive = receive
        self._counted = counted
        self._taken_bytes = 0
        self._came_bytes = 0
        self._started_s = time.monotonic()
        self._complete = False

    async def receive(self) -> Message:
        if self._complete:
            # Whoever waits now waits for the client to hang up.
            return await self._receive()
        allowed_s = self._bodies._timeout_s + self._came_bytes / SLOWEST_BYTES_PER_S
        try:
            async with asyncio.timeout(self._started_s + allowed_s - time.monotonic()):
                message = await self._receive()
        except TimeoutError:
            raise HttpError(
                408,
                f"the body was not complete: {self._came_bytes} bytes came in {allowed_s:.0f} s",
                code="request_timeout",
            ) from None
        if message["type"] == "http.request":
            size_bytes = len(message.get("body", b""))
            self._came_bytes += size_bytes
            self._complete = not message.get("more_body", False)
            if self._counted and size_bytes:
                self._bodies._take(size_bytes)
                self._taken_bytes += size_bytes
        return message

    def release(self) -> None:
        taken, self._taken_bytes = self._taken_bytes, 0
        self._bodies._give(taken)
