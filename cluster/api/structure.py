"""What a request says about the form of its answer, as a grammar: `response_format`, forced and
strict tools, one call at a time.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from llguidance import LLMatcher

from cluster.api import json_schema
from cluster.api.errors import ForbiddenValueError
from penstock.chat import dsml
from penstock.chat.encoder import AnswerForm
from penstock.errors import InvalidRequestError
from penstock.request import Grammar
from penstock.tokenizer import Tokenizer

_SCHEMA_PLACE = "response_format.json_schema.schema"
# What a call's text parameter may hold: the bar begins the mark that ends it.
_TEXT = "/[^\\uFF5C]*<\\//"


def grammar_of(body: Any, form: AnswerForm, tokenizer: Tokenizer) -> Grammar | None:
    """None if the answer is free. Raises `InvalidRequestError` with the field at fault."""
    content = _content(body.response_format)
    tools = list(body.tools or ()) if body.tool_choice != "none" else []
    calls = _calls(body, tools, tokenizer) if tools else None
    if content is None and calls is None:
        return None
    _check_ends(body)
    forced = calls is not None and _forced(body.tool_choice)
    if forced and content is not None:
        raise InvalidRequestError(
            "response_format cannot be combined with a tool_choice that forces a call",
            param="response_format",
        )
    rules = [] if calls is None else calls
    if forced:
        start = "start: block"
    elif calls is None:
        start = f"start: %json {content}"
    elif content is not None:
        start = f"start: content | block\ncontent: %json {content}"
    else:
        # Text that happens to go on with a block of calls.
        start = "start: FREE | BEFORE block_\nFREE: /(.|\\n)*/\nBEFORE: /(.|\\n)*\\n\\n</"
    text = "\n".join([start, *rules])
    complaint = LLMatcher.validate_grammar(text)
    if complaint:
        param = "response_format" if calls is None else "tools"
        raise InvalidRequestError(
            f"{param} cannot be enforced: {' '.join(complaint.split())[:200]}", param=param
        )
    return Grammar(text, form.thinking_ends if form.thinking else None)


def _check_ends(body: Any) -> None:
    """A form is complete where its grammar says so, and nowhere else."""
    for name, asked in (("ignore_eos", body.ignore_eos), ("min_tokens", body.min_tokens)):
        if asked:
            raise InvalidRequestError(
                f"{name} cannot be combined with response_format or forced tools: their grammar "
                "says where the answer ends",
                param=name,
            )


def _content(wanted: Mapping[str, Any] | None) -> str | None:
    """The schema of the content as text for a grammar."""
    kind = (wanted or {}).get("type", "text")
    if wanted is None or kind == "text":
        return None
    if kind == "json_object":
        return _json({"type": "object"})
    if kind != "json_schema":
        raise ForbiddenValueError(
            "response_format.type must be 'text', 'json_object' or 'json_schema', not "
            f"{str(kind)[:40]!a}",
            param="response_format.type",
        )
    described = wanted.get("json_schema")
    if not isinstance(described, Mapping):
        raise InvalidRequestError(
            "response_format.json_schema is required with type 'json_schema'",
            param="response_format.json_schema",
            code="missing_required_parameter",
        )
    if not isinstance(described.get("name", "x"), str):
        raise InvalidRequestError(
            "response_format.json_schema.name must be a string",
            param="response_format.json_schema.name",
            code="invalid_type",
        )
    schema = described.get("schema")
    if schema is None:
        raise InvalidRequestError(
            f"{_SCHEMA_PLACE} is required",
            param=_SCHEMA_PLACE,
            code="missing_required_parameter",
        )
    json_schema.check(schema, _SCHEMA_PLACE)
    return _json(schema)


def _json(schema: Any) -> str:
    """For `%json`, which takes one line."""
    described = dict(schema) if isinstance(schema, Mapping) else {"allOf": [schema]}
    return json.dumps({**described, "x-guidance": json_schema.FORM})


def _forced(choice: Any) -> bool:
    return choice == "required" or isinstance(choice, Mapping)


def _calls(body: Any, tools: Sequence[Any], tokenizer: Tokenizer) -> list[str] | None:
    """Rules of a block of calls; None if calls are free. The tools have been checked by the chat
    encoder.
    """
    functions = [tool["function"] for tool in tools]
    strict = any(function.get("strict") for function in functions)
    one = body.parallel_tool_calls is False or isinstance(body.tool_choice, Mapping)
    if not (strict or one or _forced(body.tool_choice)):
        return None
    if isinstance(body.tool_choice, Mapping):
        name = body.tool_choice["function"]["name"]
        functions = [function for function in functions if function["name"] == name]
    mark_id = tokenizer.token_id(dsml.MARK)
    if mark_id is None:
        raise ForbiddenValueError(
            "this model's tokenizer has no mark for tool calls", param="tool_choice"
        )
    mark = f"<[{mark_id}]>"
    places = {function["name"]: i for i, function in enumerate(functions)}
    calls = " | ".join(f"call_{i}" for i in places.values())
    rules = [
        'block: "\\n\\n<" block_',
        f'block_: {mark} "tool_calls>\\n" {"call" if one else "call+"} "</" {mark} "tool_calls>"',
        f"call: {calls}",
        f"TEXT: {_TEXT}",
    ]
    for i, function in enumerate(functions):
        number = next(n for n, tool in enumerate(tools) if tool["function"] is function)
        rules += _call(i, function, mark, f"tools[{number}].function.parameters")
    return rules


def _call(index: int, function: Mapping[str, Any], mark: str, place: str) -> list[str]:
    schema = function.get("parameters") or {}
    if function.get("strict"):
        json_schema.check(schema, place)
        if schema.get("type", "object") != "object":
            raise InvalidRequestError(f"{place}.type must be 'object'", param=f"{place}.type")
    named = json.dumps(f'invoke name="{function["name"]}">\n', ensure_ascii=False)
    head, tail = f'"<" {mark} {named}', f'"</" {mark} "invoke>\\n"'
    properties = schema.get("properties") or {}
    usable = isinstance(properties, Mapping) and (
        bool(function.get("strict")) or _enforceable(schema, place)
    )
    if not usable:
        key = '/[^"\\n<>\\uFF5C]{1,64}/'
        return [
            f"call_{index}: {head} any_{index}* {tail}",
            f'any_{index}: "<" {mark} "parameter name=\\"" KEY_{index} "\\" string=" kind_{index}',
            f"KEY_{index}: {key}",
            f'kind_{index}: "\\"true\\">" TEXT {mark} "parameter>\\n"'
            f' | "\\"false\\">" value_{index} "</" {mark} "parameter>\\n"',
            f"value_{index}: %json {_json({})}",
        ]
    needed = schema.get("required") or ()
    parts, rules = [], []
    for n, (name, described) in enumerate(properties.items()):
        if any(char in name for char in '"\n') or not name:
            raise ForbiddenValueError(
                f"the property name {name[:40]!a} at {place} cannot be written in a tool call",
                param=f"{place}.properties",
            )
        rule = f"p_{index}_{n}"
        parts.append(rule if name in needed else f"{rule}?")
        rules += _parameter(rule, name, described, schema, mark)
    body = " ".join(parts) if parts else '"\\n"'
    return [f"call_{index}: {head} {body} {tail}", *rules]


def _enforceable(schema: Any, place: str) -> bool:
    try:
        json_schema.check(schema, place)
    except InvalidRequestError:
        return False
    return bool(schema.get("properties")) and schema.get("type", "object") == "object"


def _parameter(
    rule: str, name: str, described: Any, schema: Mapping[str, Any], mark: str
) -> list[str]:
    """A line of a call. Plain texts are written raw, all else as JSON."""
    head = f'parameter name="{name}" string='
    end = f'{mark} "parameter>\\n"'
    if isinstance(described, Mapping) and _is_plain_text(described):
        opening = json.dumps(head + '"true">', ensure_ascii=False)
        return [f'{rule}: "<" {mark} {opening} TEXT {end}']
    opening = json.dumps(head + '"false">', ensure_ascii=False)
    shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    inner = {**shared, **described} if isinstance(described, Mapping) else described
    return [
        f'{rule}: "<" {mark} {opening} {rule}_v "</" {end}',
        f"{rule}_v: %json {_json(inner)}",
    ]


def _is_plain_text(schema: Mapping[str, Any]) -> bool:
    notes = {"type", "title", "description", "default", "examples"}
    return schema.get("type") == "string" and set(schema) <= notes
