"""The writer's side of the data port: offered objects, sent and hashed in a thread."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from blake3 import blake3
from google.protobuf.message import DecodeError

from kvstore.data.dialer import Dialer
from kvstore.data.frames import What, receive_answer, send_object, send_request
from kvstore.data.link import Link, LinkError
from protos.penstock.kv.v1 import kv_pb2

_LOOK_S = 1.0
"""A thread that waits looks so often whether its client still exists."""
Parts = tuple[memoryview, memoryview]
"""Prefix (length and header) and payload of an object."""
Answers = list[kv_pb2.PutResponse]


@dataclass(frozen=True)
class _Load:
    port: int
    ticket: bytes
    objects: Sequence[Parts]
    answers: asyncio.Future[Answers]


class Delivery:
    """The bytes of one call of `put_many` on one connection, a ticket after the other.

    Made on the event loop; `close` always. A failure fails every answer that is still due.
    """

    def __init__(self, dialer: Dialer, *, timeout_s: float, answer_s: float) -> None:
        self._dialer = dialer
        self._timeout_s = timeout_s
        self._answer_s = answer_s
        self._loop = asyncio.get_running_loop()
        self._loads: queue.SimpleQueue[_Load | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._link: Link | None = None
        self._error: Exception | None = None
        self._closed = False

    def start(self) -> bool:
        """False if all connections are busy."""
        return self._dialer.start(self._run)

    def send(self, port: int, ticket: bytes, objects: Sequence[Parts]) -> asyncio.Future[Answers]:
        """What the node answers, one an object; LinkError if the connection fails before."""
        answers: asyncio.Future[Answers] = self._loop.create_future()
        with self._lock:
            if self._error is None:
                self._loads.put(_Load(port, ticket, objects, answers))
            else:
                answers.set_exception(self._error)
        return answers

    def close(self, *, done: bool) -> None:
        """`done`: every answer has come. Otherwise the connection is cut."""
        self._closed = not done
        self._loads.put(None)
        link = self._link
        if link is not None and not done:
            link.close()

    def _run(self) -> None:
        due: deque[_Load] = deque()
        link: Link | None = None
        port = 0
        error: Exception | None = None
        try:
            while (load := self._next()) is not None:
                due.append(load)
                if link is None:
                    port = load.port
                    self._link = link = self._dialer.open(port)
                    if self._closed:
                        raise LinkError("cut", "nobody waits for it any more")
                self._send(link, load)
                if len(due) > 1:
                    self._answer(link, due)
                while due and self._loads.empty():
                    self._answer(link, due)
            if link is not None and not self._closed and not due:
                self._link = None
                self._dialer.keep(port, link)
                link = None
        except Exception as failure:
            error = failure
        finally:
            self._link = None
            if link is not None:
                link.end()
            self._fail(due, error or LinkError("cut", "the delivery was given up"))

    def _next(self) -> _Load | None:
        while not self._dialer.is_closed:
            with suppress(queue.Empty):
                return self._loads.get(timeout=_LOOK_S)
        return None

    def _send(self, link: Link, load: _Load) -> None:
        send_request(link, What.PUT, load.ticket, self._timeout_s)
        for parts in load.objects:
            hasher = blake3()
            for part in parts:
                hasher.update(part)
            send_object(link, parts, self._timeout_s)
            link.send([memoryview(hasher.digest())], self._timeout_s)

    def _answer(self, link: Link, due: deque[_Load]) -> None:
        """Of the oldest ticket that is due."""
        raw = receive_answer(link, self._answer_s)
        try:
            answers = list(kv_pb2.OfferResult.FromString(raw).answers)
        except DecodeError as error:
            raise LinkError("garbage", "an answer is none") from error
        if len(answers) != len(due[0].objects):
            raise LinkError("garbage", "the node answered for another number of objects")
        load = due.popleft()
        self._soon(load.answers, answers)

    def _soon(self, future: asyncio.Future[Answers], result: Answers | Exception) -> None:
        def settle() -> None:
            if future.done():
                return
            if isinstance(result, Exception):
                future.set_exception(result)
            else:
                future.set_result(result)

        # A loop that has ended takes its writer with it.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(settle)

    def _fail(self, due: deque[_Load], error: Exception) -> None:
        with self._lock:
            self._error = error
            with suppress(queue.Empty):
                while True:
                    load = self._loads.get_nowait()
                    if load is not None:
                        due.append(load)
        for load in due:
            self._soon(load.answers, error)
