"""Every setting: its name, variable, type, default and meaning."""

from __future__ import annotations

import typing
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from cluster.config import ENV_PREFIX, SECRETS, ClusterConfig
from cluster.reference.docstrings import attribute_docs, cell, first_paragraph

_HEAD = """# Settings

Made from the code. A setting has one name in all places:

| place | example |
|---|---|
| command line, where it has a flag | `--port 9000` |
| environment | `PENSTOCK_FRONT__PORT=9000` |
| file given by `--config` | `front: {port: 9000}` |

The command line outranks the environment, that the file, and the file the default. `penstock
config show` prints every value with where it came from, `penstock config schema` the JSON schema of
the file. An
unknown name is refused with the nearest known one. Sizes are bytes or `512MiB`, `4GiB`.
"""


def page() -> str:
    lines = [_HEAD]
    for section, field in ClusterConfig.model_fields.items():
        kind = field.annotation
        assert isinstance(kind, type) and issubclass(kind, BaseModel)
        lines += [f"## {section}", "", first_paragraph(kind), ""]
        lines += ["| setting | type | default | meaning |", "|---|---|---|---|"]
        lines += _rows(section, kind)
        lines.append("")
    return "\n".join(lines)


def _rows(section: str, kind: type[BaseModel]) -> list[str]:
    docs = attribute_docs(kind)
    rows = []
    for name, field in kind.model_fields.items():
        variable = f"{ENV_PREFIX}{section.upper()}__{name.upper()}"
        secret = " (secret)" if f"{section}.{name}" in SECRETS else ""
        rows.append(
            f"| `{name}`{secret}<br>`{variable}` | {cell(_type(field.annotation))} "
            f"| {_default(field)} | {cell(docs.get(name, ''))} |"
        )
    return rows


def _type(annotation: Any) -> str:
    arms = typing.get_args(annotation)
    origin = typing.get_origin(annotation)
    if origin is typing.Literal:
        return ", ".join(f"`{arm}`" for arm in arms)
    if origin is typing.Annotated:
        return _type(arms[0])
    if arms:
        shown = [_type(arm) for arm in arms if arm is not type(None)]
        return " or ".join(shown)
    return str(getattr(annotation, "__name__", annotation))


def _default(field: Any) -> str:
    value = field.get_default(call_default_factory=True, validated_data={})
    if value is PydanticUndefined:
        return "required"
    if value is None or value == "":
        return ""
    if isinstance(value, BaseModel):
        return ""
    return f"`{cell(value)}`"
