"""gRPC plumbing of this room: handlers over raw bytes, and errors on their way across the wire.

An error crosses as status code and sentence, plus its `code` and retry time in trailing metadata.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message

from penstock.errors import (
    BlockIntegrityError,
    InvalidRequestError,
    OverloadedError,
    PenstockError,
    StoreUnavailableError,
    from_code,
)
from penstock.telemetry import logs
from penstock.telemetry.trace import NO_TRACER, Tracer

CODE_KEY = "penstock-code"
RETRY_KEY = "retry-after-ms"

Request = TypeVar("Request", bound=Message)


def parse(request_type: type[Request], raw: bytes) -> Request:
    """Raises InvalidRequestError for bytes that are no such message."""
    try:
        return request_type.FromString(raw)
    except DecodeError as error:
        raise InvalidRequestError(f"the bytes are no {request_type.__name__}") from error


async def abort_with(context: Any, error: PenstockError) -> None:
    """End the call with `error`. Always raises (grpc's own exception)."""
    metadata = [(CODE_KEY, error.code or "")]
    if error.retry_after_s is not None:
        metadata.append((RETRY_KEY, str(int(error.retry_after_s * 1000))))
    code = getattr(grpc.StatusCode, error.grpc_code)
    await context.abort(code, error.message, trailing_metadata=tuple(metadata))


def unary(
    request_type: type[Request],
    call: Callable[[Request], Awaitable[Message]],
    *,
    name: str = "",
    tracer: Tracer = NO_TRACER,
) -> Any:
    """A unary method handler that parses, calls and maps errors; with a `tracer`, a span `name` of
    the trace that a call carries.
    """

    async def handle(raw: bytes, context: Any) -> bytes:
        try:
            metadata = context.invocation_metadata() or ()
            with logs.received(metadata), tracer.entry(name, metadata):
                return (await call(parse(request_type, raw))).SerializeToString()
        except PenstockError as error:
            await abort_with(context, error)
            raise

    return grpc.unary_unary_rpc_method_handler(handle)


def error_from(error: grpc.aio.AioRpcError, peer: str) -> PenstockError:
    """The error tree's word for a failed call to the store node at `peer`."""
    code, message = error.code(), error.details() or ""
    metadata = {str(key): value for key, value in error.trailing_metadata() or ()}
    if CODE_KEY in metadata:
        retry = metadata.get(RETRY_KEY)
        retry_after_s = int(retry) / 1000 if retry is not None and str(retry).isdigit() else None
        return from_code(str(metadata[CODE_KEY]), message, retry_after_s=retry_after_s)
    match code:
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return StoreUnavailableError(f"the KV store at {peer} did not answer in time")
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            return OverloadedError(f"the KV store at {peer} refused the call: {message}")
        case grpc.StatusCode.INVALID_ARGUMENT:
            return InvalidRequestError(message)
        case grpc.StatusCode.DATA_LOSS:
            return BlockIntegrityError(message)
        case _:
            return StoreUnavailableError(f"the KV store at {peer} cannot be reached: {message}")
