"""What a node does for a ticket: send objects that it holds open, or receive ones it reserved."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress

from kvstore.codec import DIGEST_BYTES
from kvstore.data.frames import What, receive_chunk, send_answer, send_object
from kvstore.data.link import Link, LinkError
from kvstore.transfer import OpenGet, OpenPut
from penstock.errors import PenstockError
from protos.penstock.kv.v1 import kv_pb2

_COMMIT_S = 10.0
"""Longest wait for the event loop to commit what has come."""


class SendWork:
    """Open objects on their way to one reader. Made on the event loop; closes them there."""

    what = What.GET

    def __init__(self, objects: Sequence[OpenGet], *, start: int, stall_s: float) -> None:
        """`start`: bytes of the first object that the reader has already."""
        self.done = asyncio.Event()
        """Sent, failed or given up: nothing is held any more."""
        self._objects = objects
        self._start = start
        self._stall_s = stall_s
        self._loop = asyncio.get_running_loop()

    def run(self, link: Link) -> None:
        try:
            start = self._start
            for found in self._objects:
                send_object(link, [found.data], self._stall_s, start=start)
                start = 0
        finally:
            _soon(self._loop, self.give_up)

    def give_up(self) -> None:
        for found in self._objects:
            found.close()
        self.done.set()


class ReceiveWork:
    """Reserved objects on their way from one writer. Each is committed as soon as it is whole."""

    what = What.PUT

    def __init__(self, puts: Sequence[OpenPut], *, idle_s: float) -> None:
        self._puts = puts
        self._idle_s = idle_s
        self._loop = asyncio.get_running_loop()
        self._answers: list[kv_pb2.PutResponse] = []

    def run(self, link: Link) -> None:
        try:
            for put in self._puts:
                while not put.is_full:
                    put.took(receive_chunk(link, put.room, self._idle_s))
                digest = bytearray(DIGEST_BYTES)
                link.receive(memoryview(digest), self._idle_s)
                _soon(self._loop, self._commit, put, bytes(digest))
            committed = threading.Event()
            _soon(self._loop, committed.set)
            if not committed.wait(_COMMIT_S):
                raise LinkError("silent", "the event loop commits nothing")
        finally:
            _soon(self._loop, self.give_up)
        answer = kv_pb2.OfferResult(answers=self._answers)
        send_answer(link, answer.SerializeToString(), self._idle_s)

    def give_up(self) -> None:
        for put in self._puts:
            put.abort()

    def _commit(self, put: OpenPut, digest: bytes) -> None:
        self._answers.append(settled(put, digest))


def settled(put: OpenPut, digest: bytes) -> kv_pb2.PutResponse:
    """Commits an object that has come whole; the answer for it."""
    try:
        fresh = put.commit(digest)
    except PenstockError as error:
        return refused(put.reservation.id, error)
    status = kv_pb2.PutResponse.STATUS_EXISTS
    if fresh:
        status = kv_pb2.PutResponse.STATUS_COMMITTED
    return kv_pb2.PutResponse(status=status, id=put.reservation.id)


def refused(id_: bytes, error: PenstockError) -> kv_pb2.PutResponse:
    """The answer for an object that is not taken."""
    return kv_pb2.PutResponse(
        status=kv_pb2.PutResponse.STATUS_REFUSED,
        id=id_,
        error_code=error.code or "",
        error_message=error.message,
        retry_after_ms=int((error.retry_after_s or 0) * 1000),
    )


def _soon(loop: asyncio.AbstractEventLoop, call: Callable[..., object], *args: object) -> None:
    # A loop that has ended takes its node with it.
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(call, *args)
