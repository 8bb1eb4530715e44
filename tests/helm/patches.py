"""Patches as the API server applies them: JSON merge patches (RFC 7386) and the strategic kind, in
which lists of objects are merged by a key of theirs.
"""

from __future__ import annotations

from typing import Any

# List field -> key of its elements (patchMergeKey in k8s.io/api), for what charts hold.
_MERGE_KEYS = {
    "containers": "name",
    "initContainers": "name",
    "env": "name",
    "volumes": "name",
    "volumeMounts": "mountPath",
    "imagePullSecrets": "name",
    "topologySpreadConstraints": "topologyKey",
    "secrets": "name",
}
_ORDER = "$setElementOrder/"
_DELETE = "$deleteFromPrimitiveList/"


def merge(target: Any, patch: Any) -> Any:
    """RFC 7386."""
    if not isinstance(patch, dict):
        return patch
    result = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = merge(result.get(key), value)
    return result


def strategic(target: Any, patch: Any, field: str = "") -> Any:
    """Strategic merge; a directive that is not known here is an error, never ignored."""
    if isinstance(patch, dict):
        return _strategic_map(target if isinstance(target, dict) else {}, patch)
    if isinstance(patch, list) and _merge_key(field, [*(target or []), *patch]):
        return _strategic_list(target or [], patch, field)
    return patch


def _strategic_map(target: dict[str, Any], patch: dict[str, Any]) -> dict[str, Any]:
    if patch.get("$patch") == "replace":
        return {k: v for k, v in patch.items() if k != "$patch"}
    result = dict(target)
    kept = patch.get("$retainKeys")
    if kept is not None:
        result = {k: v for k, v in result.items() if k in kept}
    for key, value in patch.items():
        if key.startswith(_ORDER) or key == "$retainKeys":
            continue
        if key.startswith(_DELETE):
            name = key.removeprefix(_DELETE)
            result[name] = [each for each in result.get(name, []) if each not in value]
        elif key.startswith("$"):
            raise ValueError(f"unknown directive {key}")
        elif value is None:
            result.pop(key, None)
        else:
            result[key] = strategic(result.get(key), value, key)
    for key, value in patch.items():
        if key.startswith(_ORDER):
            name = key.removeprefix(_ORDER)
            result[name] = _ordered(result.get(name, []), value, name)
    return result


def _merge_key(field: str, elements: list[Any]) -> str:
    """Ports are merged by containerPort in a container and by port in a Service."""
    if field == "ports":
        return next((k for k in ("containerPort", "port") if any(k in e for e in elements)), "")
    return _MERGE_KEYS.get(field, "")


def _strategic_list(target: list[Any], patch: list[Any], field: str) -> list[Any]:
    key = _merge_key(field, [*target, *patch])
    result = list(target)
    for element in patch:
        at = next((i for i, e in enumerate(result) if e.get(key) == element.get(key)), None)
        if element.get("$patch") == "delete":
            if at is not None:
                del result[at]
        elif at is None:
            result.append(element)
        else:
            result[at] = strategic(result[at], element)
    return result


def _ordered(elements: list[Any], order: list[Any], field: str) -> list[Any]:
    key = _merge_key(field, elements)
    if not key:
        return elements
    places = [each[key] for each in order]
    return sorted(elements, key=lambda e: places.index(e[key]) if e[key] in places else len(places))
