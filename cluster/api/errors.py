"""Errors as OpenAI's clients expect them: one body shape, one mapping."""

from __future__ import annotations

import math
from typing import Any

import orjson
from fastapi import Response
from pydantic import ValidationError

from penstock.errors import InvalidRequestError, PenstockError

_TYPE_NAMES = {
    "string_type": "a string",
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
}


class HttpError(PenstockError):
    """An error that only HTTP knows (route, method, body size)."""

    openai_type = "invalid_request_error"

    def __init__(self, status: int, message: str, *, code: str) -> None:
        super().__init__(message, code=code)
        self.http_status = status


class ForbiddenValueError(InvalidRequestError):
    """Something that OpenAI's API has and this server does not (yet)."""

    code = "unsupported_value"


def body(error: PenstockError) -> dict[str, Any]:
    """OpenAI's body; `reason` is ours and stands where there was no room (docs/limits.md)."""
    told = {
        "message": error.message,
        "type": error.openai_type,
        "param": error.param,
        "code": error.code,
    }
    if error.reason is not None:
        told["reason"] = error.reason
    return {"error": told}


def response(error: PenstockError) -> Response:
    headers = {}
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    if error.reason is not None:
        headers["X-Penstock-Reason"] = error.reason
    if error.http_status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return Response(
        orjson.dumps(body(error)), error.http_status, headers, media_type="application/json"
    )


def unexpected() -> PenstockError:
    """What a client learns of a bug: nothing but that it is one. The log has the rest."""
    return PenstockError("the server failed on this request; its log has the cause")


def from_validation(error: ValidationError) -> InvalidRequestError:
    """The first fault of a body in one sentence, with its place as `param`."""
    faults = error.errors(include_url=False)
    root = faults[0]["loc"][:1]
    # Every arm of a union complains; the one that got furthest is the one that was meant.
    first = max((f for f in faults if f["loc"][:1] == root), key=lambda f: len(f["loc"]))
    param = _place(first["loc"])
    kind = first["type"]
    if kind == "missing":
        return InvalidRequestError(
            f"'{param}' is required", param=param, code="missing_required_parameter"
        )
    wrong = [f["type"] for f in faults if f["loc"][:1] == root and _place(f["loc"]) == param]
    if all(each in _TYPE_NAMES for each in wrong):
        wanted = " or ".join(dict.fromkeys(_TYPE_NAMES[each] for each in wrong))
        return InvalidRequestError(
            f"{param or 'the body'} must be {wanted}, not {_kind(first.get('input'))}",
            param=param or None,
            code="invalid_type",
        )
    message = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return InvalidRequestError(f"'{param}': {message}", param=param, code="invalid_value")


def _place(loc: tuple[int | str, ...]) -> str:
    """`messages[0].role`; pydantic's names for the arms of a union are left out."""
    place = ""
    for part in loc:
        if isinstance(part, int):
            place += f"[{part}]"
        elif part != "str" and not part.startswith("list"):
            place += f".{part}" if place else part
    return place


def _kind(value: Any) -> str:
    names = {str: "a string", bool: "a boolean", int: "an integer", float: "a fraction"}
    names |= {list: "a list", dict: "an object", type(None): "null"}
    return names.get(type(value), type(value).__name__)
