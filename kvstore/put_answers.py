"""What a Put stream answers, read while its data is being sent."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from penstock.errors import StoreUnavailableError, from_code
from protos.penstock.kv.v1 import kv_pb2


class PutAnswers:
    """Reads a Put stream's answers while its data is being sent."""

    def __init__(self, call: Any, count: int) -> None:
        self._call = call
        self._count = count
        self.ended = False
        """No further answer will come: more data is pointless."""
        self.fresh: list[bool] = []

    async def read(self) -> None:
        """Until every object is settled. Raises the call's error."""
        try:
            while len(self.fresh) < self._count:
                raw = await self._call.read()
                if raw is grpc.aio.EOF:
                    raise asyncio.InvalidStateError("the stream ended early")
                answer = _parse_put(raw)
                if answer.status != kv_pb2.PutResponse.STATUS_RESERVED:
                    self.fresh.append(is_fresh(answer))
        finally:
            self.ended = True


def is_fresh(answer: kv_pb2.PutResponse) -> bool:
    """Whether it says that this put committed the object. Raises what it was refused with."""
    if answer.status == kv_pb2.PutResponse.STATUS_REFUSED:
        retry_after_s = answer.retry_after_ms / 1000 or None
        raise from_code(answer.error_code, answer.error_message, retry_after_s=retry_after_s)
    if answer.status not in (
        kv_pb2.PutResponse.STATUS_EXISTS,
        kv_pb2.PutResponse.STATUS_COMMITTED,
    ):
        raise StoreUnavailableError("the KV store sent an answer that settles nothing")
    return answer.status == kv_pb2.PutResponse.STATUS_COMMITTED


def _parse_put(raw: bytes) -> kv_pb2.PutResponse:
    try:
        return kv_pb2.PutResponse.FromString(raw)
    except DecodeError as error:
        raise StoreUnavailableError("the KV store sent what is no message") from error
