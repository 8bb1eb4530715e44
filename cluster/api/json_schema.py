"""JSON schemas that clients send: what is wrong with one, and where, before anything runs.

llguidance enforces a schema exactly or refuses it; this module says which keyword at which place.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import unquote

from jsonschema.exceptions import best_match
from jsonschema.validators import Draft202012Validator, validator_for
from llguidance import LLMatcher

from cluster.api.errors import ForbiddenValueError
from penstock.errors import InvalidRequestError

MOST_BYTES = 1 << 18
_MOST_DEPTH = 64
_MOST_TRIALS = 300
# Of JSON Schema's vocabularies, and not to be enforced by a grammar.
_NOT_ENFORCED = frozenset({
    "not", "if", "then", "else", "contains", "minContains", "maxContains", "uniqueItems",
    "propertyNames", "dependentRequired", "dependentSchemas", "dependencies", "unevaluatedItems",
    "unevaluatedProperties", "$dynamicRef", "$dynamicAnchor", "$recursiveRef",
    "$recursiveAnchor", "x-guidance",
})  # fmt: skip
_ONE = ("items", "additionalItems", "additionalProperties")
_LIST = ("anyOf", "allOf", "oneOf", "prefixItems", "items")
_MAP = ("properties", "patternProperties", "$defs", "definitions")
# As json.dumps writes: one way to write a value, and no endless white space.
FORM = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def check(schema: Any, place: str) -> None:
    """Raises `InvalidRequestError` for what is no schema or can never be met,
    `ForbiddenValueError` for what this server cannot enforce. Both name keyword and place.
    """
    if not isinstance(schema, Mapping):
        raise InvalidRequestError(
            f"{place} must be a JSON schema: an object", param=place, code="invalid_type"
        )
    _check_size(schema, place)
    _check_form(schema, place)
    for where, each, keyword in _keywords(schema, place):
        if keyword in _NOT_ENFORCED:
            raise ForbiddenValueError(
                f"the keyword {keyword!r} at {where} is not supported: this server cannot enforce "
                "it; leave it out and check the answer yourself",
                param=f"{where}.{keyword}",
            )
        if keyword in ("const", "enum") and _inexact(each[keyword]):
            raise ForbiddenValueError(
                f"the keyword {keyword!r} at {where} has a number beyond 2^53, which JSON readers "
                "round; send it as a string",
                param=f"{where}.{keyword}",
            )
    endless = _endless(schema, place)
    if endless:
        raise InvalidRequestError(
            f"the keyword '$ref' at {endless} asks for a value without an end: what it refers to "
            "must contain itself",
            param=f"{endless}.$ref",
        )
    complaint = _complaint(schema)
    if complaint:
        where, keyword, complaint = _locate(schema, place, complaint)
        named = f"the keyword {keyword!r} at {where}" if keyword else f"the schema at {where}"
        kind = ForbiddenValueError if "not supported" in complaint else InvalidRequestError
        raise kind(
            f"{named} cannot be enforced: {complaint}",
            param=f"{where}.{keyword}" if keyword else where,
        )


def _check_size(schema: Mapping[str, Any], place: str) -> None:
    deep = _depth(schema)
    try:
        size = len(json.dumps(schema))
    except RecursionError:
        deep, size = _MOST_DEPTH + 1, 0
    if size > MOST_BYTES:
        raise InvalidRequestError(
            f"{place} has {size} bytes, more than the {MOST_BYTES} that a schema may have",
            param=place,
        )
    if deep > _MOST_DEPTH:
        raise InvalidRequestError(
            f"{place} is nested deeper than {_MOST_DEPTH} levels; use $defs and $ref", param=place
        )


def _depth(value: Any) -> int:
    """Levels of lists and objects, without recursion; stops counting behind the limit."""
    level, depth = [value], 0
    while level and depth <= _MOST_DEPTH:
        inner: list[Any] = []
        for each in level:
            if isinstance(each, Mapping):
                inner += each.values()
            elif isinstance(each, list):
                inner += each
        level, depth = inner, depth + 1
    return depth


def _check_form(schema: Mapping[str, Any], place: str) -> None:
    """Against the schema of schemas."""
    meta = validator_for(schema, default=Draft202012Validator)
    if isinstance(schema.get("items"), list) and "$schema" not in schema:
        # Written before 2020 and without saying so.
        meta = validator_for({"$schema": "http://json-schema.org/draft-07/schema#"})
    fault = best_match(meta(meta.META_SCHEMA).iter_errors(schema))
    if fault is not None:
        where = place + "".join(_step(part) for part in fault.absolute_path)
        raise InvalidRequestError(
            f"{where} is no valid JSON schema: {fault.message[:200]}", param=where
        )


def _step(part: Any) -> str:
    return f"[{part}]" if isinstance(part, int) else f".{part}"


def _inexact(value: Any) -> bool:
    """Whether a whole number in `value` has lost digits on its way (a float holds it now)."""
    inner = value.values() if isinstance(value, Mapping) else value
    if isinstance(inner, float):
        return abs(inner) >= 2.0**53
    return not isinstance(inner, str | int | None) and any(map(_inexact, inner))


def _keywords(schema: Any, place: str) -> Iterator[tuple[str, Mapping[str, Any], str]]:
    """Each schema's place, the schema, and each of its keywords."""
    pending = [(place, schema)]
    while pending:
        where, each = pending.pop()
        if isinstance(each, Mapping):
            yield from ((where, each, str(keyword)) for keyword in each)
            pending += _inner(each, where)


def _inner(schema: Mapping[str, Any], place: str) -> list[tuple[str, Any]]:
    """Schemas directly inside `schema`."""
    found: list[tuple[str, Any]] = []
    found += [(f"{place}.{key}", schema[key]) for key in _ONE if key in schema]
    for key in _LIST:
        if isinstance(schema.get(key), list):
            found += [(f"{place}.{key}[{i}]", each) for i, each in enumerate(schema[key])]
    for key in _MAP:
        if isinstance(schema.get(key), Mapping):
            found += [(f"{place}.{key}.{name}", each) for name, each in schema[key].items()]
    return found


def _endless(schema: Mapping[str, Any], place: str) -> str:
    """Where a reference has no finite value; "" if all have one. The least fixed point of "has a
    finite value", from below.
    """
    nodes: list[tuple[str, Mapping[str, Any]]] = []
    pending: list[tuple[str, Any]] = [(place, schema)]
    while pending:
        where, each = pending.pop()
        if isinstance(each, Mapping):
            nodes.append((where, each))
            pending += _inner(each, where)
    finite: set[int] = set()
    grown = True
    while grown:
        # Inner ones stand behind the ones that hold them.
        new = [n for _, n in reversed(nodes) if id(n) not in finite and _ends(n, schema, finite)]
        finite.update(map(id, new))
        grown = bool(new)
    return next((where for where, n in nodes if id(n) not in finite and "$ref" in n), "")


def _ends(node: Mapping[str, Any], root: Mapping[str, Any], finite: set[int]) -> bool:
    def has_end(inner: Any) -> bool:
        return not isinstance(inner, Mapping) or id(inner) in finite

    needed = [*node.get("allOf", ())]
    if isinstance(node.get("$ref"), str):
        needed.append(_target(node["$ref"], root))
    if node.get("type") == "object":
        properties = node.get("properties", {})
        needed += [properties[name] for name in node.get("required", ()) if name in properties]
    if node.get("type") == "array" and node.get("minItems", 0) > 0:
        needed.append(node.get("items"))
    choices = [node[key] for key in ("anyOf", "oneOf") if node.get(key)]
    return all(map(has_end, needed)) and all(any(map(has_end, each)) for each in choices)


def _target(reference: str, root: Mapping[str, Any]) -> Any:
    """What a reference within the schema means; None for any other."""
    if not reference.startswith("#"):
        return None
    found: Any = root
    for step in reference[1:].split("/")[1:]:
        key = unquote(step).replace("~1", "/").replace("~0", "~")
        if isinstance(found, list) and key.isdecimal() and int(key) < len(found):
            found = found[int(key)]
        else:
            found = found.get(key) if isinstance(found, Mapping) else None
    return found


def _complaint(schema: Any) -> str:
    """llguidance's words; "" if it can enforce the schema."""
    try:
        grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema))
    except ValueError as error:
        return _one_line(str(error))
    return _one_line(LLMatcher.validate_grammar(grammar))


def _one_line(text: str) -> str:
    # Of a regex's complaint, the reason stands last.
    reason = " ".join(text.rpartition("error: ")[2].split())
    return reason.partition(". Enable ")[0][:200]


def _locate(schema: Mapping[str, Any], place: str, complaint: str) -> tuple[str, str, str]:
    """The innermost schema that alone gets a complaint, its keyword at fault, and the complaint."""
    definitions = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    trials = _MOST_TRIALS
    current: Mapping[str, Any] = schema
    searching = True
    while searching:
        searching = False
        for where, inner in _inner(current, place):
            trials -= 1
            if trials < 0 or not isinstance(inner, Mapping):
                continue
            found = _complaint({**definitions, **inner})
            if found:
                current, place, complaint, searching = inner, where, found, True
                break
    # The complaint often names it; `type` rarely is what has to go.
    order = sorted(current, key=lambda key: (key not in complaint, key == "type"))
    for keyword in order:
        trials -= 1
        rest = {key: value for key, value in current.items() if key != keyword}
        if trials >= 0 and not _complaint({**definitions, **rest}):
            return place, keyword, complaint
    return place, "", complaint
