"""The OpenAPI document: FastAPI's list of routes, and what each takes, answers and refuses.

Routes read their bodies and write their answers themselves, so the facts stand here, in one table.
`tests/cluster/api/test_schemathesis.py` holds the server to them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from cluster.api import answers
from cluster.api.batches import MOST_LISTED as MOST_BATCHES
from cluster.api.batches import BatchBody
from cluster.api.files import MOST_LISTED as MOST_FILES
from cluster.api.files import PURPOSES, SHORTEST_EXPIRY_S
from cluster.api.meta import own_version
from cluster.api.schema import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from cluster.api.scope import is_open
from penstock.telemetry import CONTENT_TYPE

_REF = "#/components/schemas/{model}"
_KEY = "bearer"
_ALWAYS = (400, 415, 500)
"""A wrong X-Request-Id or Content-Encoding is refused everywhere, and a bug may be anywhere."""
_KEYED = (401, 403, 429)
_WITH_BODY = (408, 413)
_WHY = {
    400: "The request is wrong; `message` says where.",
    401: "No valid API key.",
    403: "The key may not do this.",
    404: "What the request names is not here, or this server does not keep such things.",
    405: "The path, once decoded, is another one that does not take this method.",
    408: "The body did not come in time.",
    409: "It contradicts what is there already.",
    413: "The body is larger than this server takes.",
    415: "The body comes encoded; nothing here unpacks.",
    429: "A limit is reached; the same request may succeed after `Retry-After` seconds.",
    500: "A fault of the server; its log has the cause.",
    503: "A part of the cluster that the request needs cannot be reached.",
    504: "The cluster did not answer in time.",
}
_STREAM = {
    "type": "object",
    "description": "With `stream: true`: server-sent events of this shape; comments between them "
    "keep the connection alive and tell progress.",
    "required": ["data"],
    "properties": {
        "data": {"type": "string", "description": "A chunk as JSON, or `[DONE]` at the end."}
    },
}
_BYTES = {"type": "string", "format": "binary"}
_UPLOAD = {
    "type": "object",
    "required": ["file", "purpose"],
    "properties": {
        "file": _BYTES,
        "purpose": {"type": "string", "enum": list(PURPOSES)},
        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
        "expires_after[seconds]": {"type": "integer", "minimum": SHORTEST_EXPIRY_S},
    },
}


def _query(name: str, **schema: Any) -> dict[str, Any]:
    return {"name": name, "in": "query", "required": False, "schema": schema}


@dataclass(frozen=True)
class _Operation:
    answer: type[BaseModel] | None
    """Of status 200, as JSON."""
    refusals: tuple[int, ...] = ()
    """Beside those of every operation of its kind."""
    takes: type[BaseModel] | None = None
    more: dict[str, Any] | None = None
    """Other media types of status 200."""
    query: Sequence[dict[str, Any]] = ()
    upload: bool = False


_AFTER = _query("after", type="string")
_CLUSTER = (503, 504)
_OPERATIONS: dict[tuple[str, str], _Operation] = {
    ("post", "/v1/chat/completions"): _Operation(
        answers.ChatCompletion,
        (404, *_CLUSTER),
        takes=ChatBody,
        more={"text/event-stream": _STREAM},
    ),
    ("post", "/v1/completions"): _Operation(
        answers.TextCompletion,
        (404, *_CLUSTER),
        takes=CompletionBody,
        more={"text/event-stream": _STREAM},
    ),
    ("get", "/v1/files"): _Operation(
        answers.FileList,
        (404, 503),
        query=(
            _query("limit", type="integer", minimum=1, maximum=MOST_FILES),
            _query("order", type="string", enum=["asc", "desc"]),
            # Any: one that no file has finds none.
            _query("purpose", type="string"),
            _AFTER,
        ),
    ),
    ("post", "/v1/files"): _Operation(answers.StoredFile, (404, 503), upload=True),
    ("get", "/v1/files/{file_id}"): _Operation(answers.StoredFile, (404, 503)),
    ("delete", "/v1/files/{file_id}"): _Operation(answers.DeletedFile, (404, 405, 503)),
    ("get", "/v1/files/{file_id}/content"): _Operation(
        None, (404, 503), more={"application/octet-stream": _BYTES, "application/jsonl": _BYTES}
    ),
    ("get", "/v1/batches"): _Operation(
        answers.BatchList,
        (404, 503),
        query=(_query("limit", type="integer", minimum=1, maximum=MOST_BATCHES), _AFTER),
    ),
    ("post", "/v1/batches"): _Operation(answers.Batch, (404, 409, *_CLUSTER), takes=BatchBody),
    ("get", "/v1/batches/{batch_id}"): _Operation(answers.Batch, (404, 405, 503)),
    ("post", "/v1/batches/{batch_id}/cancel"): _Operation(answers.Batch, (404, 409, 503)),
    ("get", "/v1/models"): _Operation(answers.ModelList, _CLUSTER),
    ("get", "/v1/models/{model_id}"): _Operation(answers.Model, (404, *_CLUSTER)),
    ("post", "/tokenize"): _Operation(answers.Tokens, _CLUSTER, takes=TokenizeBody),
    ("post", "/detokenize"): _Operation(answers.Text, (503,), takes=DetokenizeBody),
    ("get", "/health"): _Operation(answers.Health),
    ("get", "/ready"): _Operation(answers.Ready),
    ("get", "/version"): _Operation(answers.Version),
    ("get", "/metrics"): _Operation(
        None,
        more={CONTENT_TYPE: {"type": "string"}},
        query=(_query("scope", type="string", enum=["cluster", "front"], default="cluster"),),
    ),
    ("get", "/cluster"): _Operation(answers.Cluster),
    ("get", "/cluster/routes/{request_id}"): _Operation(answers.RouteTold, (404,)),
}


def describe(app: FastAPI, *, keyed: bool) -> dict[str, Any]:
    """The document of `app`. `keyed`: this server asks for an API key.

    Raises `KeyError` for a route that the table does not know: none can be added without one.
    """
    document = get_openapi(
        title=app.title, version=own_version(), description=app.description, routes=app.routes
    )
    schemas: dict[str, Any] = {}
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            _fill(operation, _OPERATIONS[method, path], schemas, path, keyed=keyed)
    ready = document["paths"]["/ready"]["get"]["responses"]
    # Not an error's shape: what is missing, as with 200.
    ready["503"] = {**ready["200"], "description": "A request could not be served now."}
    document["components"] = {
        "schemas": dict(sorted(schemas.items())),
        "securitySchemes": {_KEY: {"type": "http", "scheme": "bearer"}},
    }
    return document


def _fill(
    operation: dict[str, Any], facts: _Operation, schemas: dict[str, Any], path: str, *, keyed: bool
) -> None:
    content = dict(facts.more or {})
    if facts.answer is not None:
        content = {"application/json": _hoisted(facts.answer, schemas), **content}
    operation["responses"] = {
        "200": {
            "description": "OK",
            "content": {media: {"schema": schema} for media, schema in content.items()},
        }
    }
    refusals = {*_ALWAYS, *facts.refusals}
    takes = facts.takes is not None or facts.upload
    if takes:
        refusals |= {*_WITH_BODY}
    if not is_open(path):
        refusals |= {*_KEYED}
        operation["security"] = [{_KEY: []}] if keyed else [{}, {_KEY: []}]
    for status in sorted(refusals):
        operation["responses"][str(status)] = _refusal(status, schemas)
    found = [p for p in operation.get("parameters", ()) if p["in"] == "path"]
    if found or facts.query:
        operation["parameters"] = [*found, *facts.query]
    if takes:
        schema = _hoisted(facts.takes, schemas) if facts.takes is not None else _UPLOAD
        media = "multipart/form-data" if facts.upload else "application/json"
        operation["requestBody"] = {"required": True, "content": {media: {"schema": schema}}}


def _refusal(status: int, schemas: dict[str, Any]) -> dict[str, Any]:
    schema = _hoisted(answers.ErrorAnswer, schemas)
    told: dict[str, Any] = {
        "description": f"{HTTPStatus(status).phrase}. {_WHY[status]}",
        "content": {"application/json": {"schema": schema}},
    }
    if status == 429:
        told["headers"] = {"Retry-After": {"schema": {"type": "string"}}}
    if status == 401:
        told["headers"] = {"WWW-Authenticate": {"schema": {"type": "string"}}}
    return told


def _hoisted(model: type[BaseModel], schemas: dict[str, Any]) -> dict[str, str]:
    """A reference to the schema of `model`; it and what it refers to go into `schemas`."""
    name = model.__name__
    if name not in schemas:
        schema = model.model_json_schema(ref_template=_REF)
        for part, content in schema.pop("$defs", {}).items():
            if schemas.setdefault(part, content) != content:
                raise ValueError(f"two schemas of the OpenAPI document are called {part}")
        schemas[name] = schema
    return {"$ref": _REF.format(model=name)}
