"""A client's gRPC connections to its node: short calls with a deadline, and errors in our words."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from typing import Any, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message

from kvstore.channel import open_channel
from kvstore.rpc import error_from
from penstock.errors import StoreUnavailableError
from penstock.peers import ALONE, Peers

_SERVICE = "/penstock.kv.v1.KvStore/"
_MAX_MS = 2**32 - 1

Response = TypeVar("Response", bound=Message)


class NodeCalls:
    """Two channels to one node: bulk data never keeps a look-up waiting. `close` once."""

    def __init__(self, address: str, *, timeout_s: float, peers: Peers = ALONE) -> None:
        """`timeout_s`: deadline of short calls and longest silence of a stream."""
        self.address = address
        self.timeout_s = timeout_s
        self._closed = False
        self._control = open_channel(address, peers)
        self._bulk = open_channel(address, peers)
        self.put = self._bulk.stream_stream(_SERVICE + "Put")
        self.get = self._bulk.unary_stream(_SERVICE + "Get")

    async def close(self) -> None:
        self._closed = True
        await self._control.close()
        await self._bulk.close()

    def check_open(self) -> None:
        """Raises StoreUnavailableError after `close`."""
        if self._closed:
            raise StoreUnavailableError("this store client has been closed")

    async def call(self, method: str, request: Message, response_type: type[Response]) -> Response:
        self.check_open()
        call = self._control.unary_unary(
            _SERVICE + method,
            request_serializer=type(request).SerializeToString,
            response_deserializer=response_type.FromString,
        )
        try:
            response: Response = await call(request, timeout=self.timeout_s)
        except grpc.aio.AioRpcError as error:
            raise error_from(error, self.address) from error
        return response

    def flags(self, raw: bytes, asked: Sequence[object]) -> list[bool]:
        """Of an answer with one byte an id."""
        if len(raw) != len(asked):
            raise self.protocol_error("answered for another number of ids")
        return [byte != 0 for byte in raw]

    def parse(self, raw: bytes, response_type: type[Response]) -> Response:
        try:
            return response_type.FromString(raw)
        except DecodeError as error:
            raise self.protocol_error("sent what is no message") from error

    async def failure(self, call: Any, error: Exception | None) -> Exception:
        """Why a stream has ended, in the error tree's words."""
        if not isinstance(error, grpc.aio.AioRpcError):
            try:
                async with asyncio.timeout(self.timeout_s):
                    code, details = await call.code(), await call.details()
                    trailing = await call.trailing_metadata()
            except TimeoutError:
                return StoreUnavailableError(f"the KV store at {self.address} went silent")
            error = grpc.aio.AioRpcError(code, grpc.aio.Metadata(), trailing, details=details)
        return error_from(error, self.address)

    def protocol_error(self, what: str) -> StoreUnavailableError:
        return StoreUnavailableError(f"the KV store at {self.address} {what}")


def milliseconds(seconds: float) -> int:
    return min(max(0, math.ceil(seconds * 1000)), _MAX_MS)
