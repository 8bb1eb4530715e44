"""`values.schema.json`: the chart's types with the product's sections put in."""

from __future__ import annotations

from typing import Any

from cluster.chart.owned import OWNED
from cluster.chart.values import Values
from cluster.config import ClusterConfig

_URLS = frozenset({"batch.journal_url"})
"""Without user and password: these values end up in plain sight. A URL with them belongs into a
Secret and from there into `front.extraEnv`.
"""
# What Helm's own validator knows; pydantic writes nothing newer than it.
_DIALECT = "http://json-schema.org/draft-07/schema#"


def values_schema() -> dict[str, Any]:
    """JSON schema of `values.yaml`. Every key of the chart's own is required: the chart's defaults
    give it, and a release that deletes one by `null` should hear of it here.
    """
    schema = Values.model_json_schema(by_alias=True)
    definitions: dict[str, Any] = schema.pop("$defs", {})
    for definition in (schema, *definitions.values()):
        for name, prop in definition.get("properties", {}).items():
            section = prop.pop("x-section", None)
            if section is not None:
                definition["properties"][name] = _section(section, definitions)
            prop.pop("title", None)
    # Subcharts and parents may pass these to every chart.
    schema["properties"]["global"] = {"type": "object"}
    return {"$schema": _DIALECT, **schema, "title": "Penstock", "$defs": definitions}


def _section(name: str, definitions: dict[str, Any]) -> dict[str, Any]:
    """The product's section without what the chart owns; nothing in it is required."""
    of_section: Any = ClusterConfig.model_fields[name].annotation
    schema: dict[str, Any] = of_section.model_json_schema()
    for key, definition in schema.pop("$defs", {}).items():
        definitions.setdefault(key, definition)
    properties = {
        field: _plain(prop)
        for field, prop in schema["properties"].items()
        if f"{name}.{field}" not in OWNED
    }
    for field in _URLS & {f"{name}.{field}" for field in properties}:
        properties[field.partition(".")[2]] = {"type": "string", "pattern": "^[^@]*$"}
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _plain(prop: dict[str, Any]) -> dict[str, Any]:
    """Without titles and defaults: a default here would be a second place for it."""
    return {key: value for key, value in prop.items() if key not in ("title", "default")}
