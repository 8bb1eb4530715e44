"""The HTTP API from its OpenAPI document, and every error that it can answer with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cluster.reference.docstrings import cell, first_paragraph
from penstock.errors import PenstockError

_HEAD = """# HTTP API

Made from the server's own OpenAPI document (`GET /openapi.json`; `/docs` shows it in a browser).
[OpenAI's parameters](../openai.md) says of each one whether it is supported, ignored or refused.
"""
_ERRORS = """## Errors

Every error has OpenAI's shape, also inside a stream that has begun:
`{"error": {"message", "type", "param", "code"}}`. Over gRPC the same code stands in the trailing
metadata `penstock-code`. What is marked "later" carries `Retry-After`.

| code | HTTP | gRPC | later | meaning |
|---|---|---|---|---|
"""
Document = Mapping[str, Any]


def page() -> str:
    document = openapi()
    lines = [_HEAD]
    bodies: dict[str, Document] = {}
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            lines += [f"## `{method.upper()} {path}`", "", _about(operation), ""]
            schema = _body(operation, document)
            if schema is not None:
                lines += _fields(schema, bodies, document)
    if bodies:
        lines += ["## Parts of bodies", ""]
        for name in sorted(bodies):
            lines += [f"### {name}", "", *_table(bodies[name])]
    return "\n".join([*lines, _ERRORS + "\n".join(_error_rows()), ""])


def openapi() -> Document:
    from cluster.api import create_app
    from cluster.api.fake_service import FakeService
    from cluster.config import FrontSection
    from penstock.telemetry import Telemetry

    app = create_app(
        FakeService(), tokenizer=None, chat=None, config=FrontSection(), telemetry=Telemetry()
    )
    document: Document = app.openapi()
    return document


def _about(operation: Document) -> str:
    return " ".join(str(operation.get("description") or operation.get("summary", "")).split())


def _body(operation: Document, document: Document) -> Document | None:
    content = operation.get("requestBody", {}).get("content", {})
    schema: Document | None = content.get("application/json", {}).get("schema")
    return None if schema is None else _resolved(schema["$ref"], document)


def _resolved(reference: str, document: Document) -> Document:
    schema: Document = document["components"]["schemas"][reference.rsplit("/", 1)[-1]]
    return schema


def _fields(schema: Document, bodies: dict[str, Document], document: Document) -> list[str]:
    pending: list[Any] = [schema["properties"]]
    while pending:
        each = pending.pop()
        if isinstance(each, dict):
            reference = each.get("$ref")
            if reference is not None:
                part = bodies[reference.rsplit("/", 1)[-1]] = _resolved(reference, document)
                pending.append(part["properties"])
            pending += each.values()
        elif isinstance(each, list):
            pending += each
    return _table(schema)


def _table(schema: Document) -> list[str]:
    required = set(schema.get("required", ()))
    lines = ["| field | type | default | meaning |", "|---|---|---|---|"]
    for name, field in schema["properties"].items():
        default = field.get("default")
        shown = "required" if name in required else "" if default is None else f"`{default}`"
        kind, about = cell(_type(field)), cell(field.get("description", ""))
        lines.append(f"| `{name}` | {kind} | {shown} | {about} |")
    return [*lines, ""]


def _type(field: Document) -> str:
    if "$ref" in field:
        return str(field["$ref"]).rsplit("/", 1)[-1]
    for arms in ("anyOf", "oneOf", "allOf"):
        if arms in field:
            shown = [_type(arm) for arm in field[arms] if arm.get("type") != "null"]
            return " or ".join(dict.fromkeys(shown))
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if "const" in field:
        return f"`{field['const']}`"
    if field.get("type") == "array":
        return f"list of {_type(field.get('items', {}))}"
    return str(field.get("type", "any"))


def _error_rows() -> list[str]:
    rows, pending = {}, [PenstockError]
    while pending:
        kind = pending.pop()
        pending += kind.__subclasses__()
        if kind.__module__ != PenstockError.__module__ or not kind.code:
            continue
        later = "yes" if kind.retry_after_s is not None else ""
        rows[kind.code] = (
            f"| `{kind.code}` | {kind.http_status} | {kind.grpc_code} | {later} "
            f"| {cell(first_paragraph(kind))} |"
        )
    return [rows[code] for code in sorted(rows)]
