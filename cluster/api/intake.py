"""How a body comes in: bounded, parsed once, checked against its schema."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import TypeVar

import orjson
from fastapi import Request
from pydantic import BaseModel, ValidationError

from cluster.api.errors import HttpError, from_validation
from cluster.api.state import ApiState
from penstock.errors import InvalidRequestError

MOST_DEPTH = 100
"""How deep lists and objects of a body may nest."""

B = TypeVar("B", bound=BaseModel)
# How much of a body that is too large is read and dropped, so that its sender can read the refusal
# (a connection closed while it still writes would show it a broken pipe instead).
_DRAIN_FACTOR = 4
_DRAIN_TIMEOUT_S = 10.0


def state_of(request: Request) -> ApiState:
    state: ApiState = request.app.state.penstock
    return state


async def read_body(request: Request, limit_bytes: int) -> bytes:
    """The whole body. Raises 413 as soon as it is known to be larger than `limit_bytes`."""
    too_large = HttpError(
        413,
        f"the body is larger than {limit_bytes} bytes, the limit of this server",
        code="request_too_large",
    )
    announced = request.headers.get("content-length", "")
    if announced.isascii() and announced.isdigit() and int(announced) > _DRAIN_FACTOR * limit_bytes:
        raise too_large
    chunks: list[bytes] = []
    size = 0
    stream = request.stream()
    async for chunk in stream:
        size += len(chunk)
        if size > limit_bytes:
            chunks.clear()
            await _drain(stream, (_DRAIN_FACTOR - 1) * limit_bytes)
            raise too_large
        chunks.append(chunk)
    return b"".join(chunks)


async def _drain(stream: AsyncIterator[bytes], most_bytes: int) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_DRAIN_TIMEOUT_S):
            async for chunk in stream:
                most_bytes -= len(chunk)
                if most_bytes < 0:
                    return


def parse(schema: type[B], raw: bytes) -> B:
    """`raw` as JSON in `schema`. Raises `InvalidRequestError`."""
    try:
        content = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        reason = str(error)[:200]
        raise InvalidRequestError(
            f"the body is not valid JSON: {reason}", code="invalid_json"
        ) from (error)
    if raw.count(b"[") + raw.count(b"{") > MOST_DEPTH:
        _check_depth(content)
    try:
        return schema.model_validate(content)
    except ValidationError as error:
        raise from_validation(error) from error


def _check_depth(content: object) -> None:
    """Raises `InvalidRequestError` for what code that descends could not follow."""
    level, depth = [content], 0
    while level:
        if depth > MOST_DEPTH:
            raise InvalidRequestError(
                f"the body nests deeper than {MOST_DEPTH} levels", code="invalid_json"
            )
        deeper: list[object] = []
        for each in level:
            if isinstance(each, dict):
                deeper += [value for value in each.values() if isinstance(value, dict | list)]
            elif isinstance(each, list):
                deeper += [value for value in each if isinstance(value, dict | list)]
        level, depth = deeper, depth + 1
