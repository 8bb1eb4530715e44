"""Answers bound to a form: random JSON schemas through HTTP, tool calls of DeepSeek's markup, and
what is said about schemas that cannot be enforced.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from typing import Any

import httpx
import numpy as np
import pytest
from api_harness import Api, chat, make_api
from from_schema import from_schema
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator, FormatChecker

from cluster.api.schema import ChatBody
from cluster.api.structure import grammar_of
from decode.grammar import LlGrammars
from model.sampler import sample
from penstock.chat import open_chat
from penstock.chat.answer import Answer, read_answer
from penstock.errors import InvalidRequestError
from penstock.request import Sampling
from penstock.tokenizer import Tokenizer, open_tokenizer
from tests.penstock import v4_folder as v4

URL = "/v1/chat/completions"
PLACE = "response_format.json_schema.schema"
# The fake writes letters and blanks; this makes it end strings, lists, objects and the answer, and
# write what formats and patterns ask for.
ENDS = {ord('"'): 37, ord("}"): 36, ord("]"): 36, ord("@"): 35, ord("Z"): 37}
ENDS |= {**dict.fromkeys(b"0123456789", 33), 256: 45}
MUCH = settings(
    max_examples=200,
    deadline=None,
    # Shrinking a schema takes minutes and shows little that the first one does not.
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=list(HealthCheck),
)


def form(schema: Any) -> dict[str, Any]:
    described = {"name": "answer", "schema": schema, "strict": True}
    return {"response_format": {"type": "json_schema", "json_schema": described}}


async def ask(api: Api, more: dict[str, Any], **fields: Any) -> httpx.Response:
    bias = {str(token): bias for token, bias in ENDS.items()}
    body = {**chat("x", max_tokens=1500, logit_bias=bias), **more, **fields}
    async with api.client() as client:
        return await client.post(URL, json=body)


def written(answer: httpx.Response) -> Any:
    """The value that the model wrote; it must have ended by itself."""
    assert answer.status_code == 200, answer.text
    choice = answer.json()["choices"][0]
    assert choice["finish_reason"] == "stop", choice
    return json.loads(choice["message"]["content"])


def _const(value: Any) -> dict[str, Any]:
    return {"const": value}


def _object(needed: dict[str, Any], **optional: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {**needed, **optional},
        "required": list(needed),
        "additionalProperties": False,
    }


def _leaves() -> st.SearchStrategy[Any]:
    """JSON schemas of scalars that can be met, each kind from the schema of such schemas."""
    small = {"type": "integer", "minimum": 0, "maximum": 2}
    more = {"type": "integer", "minimum": 2, "maximum": 5}
    scalar = {"type": ["string", "integer", "boolean", "null"], "maxLength": 6}
    scalar |= {"minimum": -(2**53), "maximum": 2**53}
    formats = {"enum": ["date", "uuid", "ipv4", "date-time", "email"]}
    patterns = {"enum": ["^a+$", "^[a-c]{2,4}$", "^(x|yz)*$", "[0-9]"]}
    kinds = [
        _object({"type": _const("string")}, minLength=small, maxLength=more),
        _object({"type": _const("string"), "format": formats}),
        _object({"type": _const("string"), "pattern": patterns}),
        _object(
            {"type": _const("integer")},
            minimum={"type": "integer", "minimum": -9, "maximum": 0},
            maximum={"type": "integer", "minimum": 10, "maximum": 5000},
            multipleOf={"type": "integer", "minimum": 1, "maximum": 9},
        ),
        _object(
            {"type": _const("number")},
            exclusiveMinimum={"type": "integer", "minimum": -9, "maximum": 0},
            maximum={"type": "number", "minimum": 1, "maximum": 100},
        ),
        _object({"type": {"enum": ["boolean", "null"]}}, description={"type": "string"}),
        _object({"enum": {"type": "array", "items": scalar, "minItems": 1, "maxItems": 5}}),
        _object({"const": scalar}),
    ]
    return st.one_of([from_schema(kind) for kind in kinds])


NAMES = ["a", "bb", "c d", 'e"f', "\u00e9"]


def _around(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    members = st.dictionaries(st.sampled_from(NAMES), inner, max_size=4)
    several = st.lists(inner, min_size=1, max_size=3)
    names = st.lists(st.sampled_from(NAMES), unique=True, max_size=3)
    closed = st.builds(
        lambda properties, count: {
            "type": "object",
            "properties": properties,
            "required": list(properties)[:count],
            "additionalProperties": False,
        },
        members,
        st.integers(0, 4),
    )
    bounds = {"minItems": st.integers(0, 2), "maxItems": st.integers(2, 4)}
    return st.one_of(
        closed,
        st.fixed_dictionaries(
            {"type": st.just("object"), "properties": members}, optional={"required": names}
        ),
        st.fixed_dictionaries({"type": st.just("array"), "items": inner}, optional=bounds),
        st.fixed_dictionaries({"type": st.just("array"), "prefixItems": several}),
        st.fixed_dictionaries({"anyOf": several}),
        st.builds(lambda n: {"$ref": "#/$defs/n", "$defs": {"n": n}}, inner),
    )


def schemas() -> st.SearchStrategy[Any]:
    """JSON schemas that can always be met."""
    nested = st.recursive(_leaves(), _around, max_leaves=8)
    return nested.map(_hoisted)


def _hoisted(schema: Any) -> Any:
    """Definitions belong to the root: each gets a name of its own there."""
    found: dict[str, Any] = {}

    def walk(value: Any) -> Any:
        if isinstance(value, list):
            return [walk(each) for each in value]
        if not isinstance(value, dict):
            return value
        if "$defs" in value:
            name = f"n{len(found)}"
            found[name] = {}
            found[name] = walk(value["$defs"]["n"])
            return {"$ref": f"#/$defs/{name}"}
        return {key: walk(each) for key, each in value.items()}

    whole = walk(schema)
    return {**whole, "$defs": found} if found else whole


def test_random_schemas_are_all_met() -> None:
    api, seen = make_api(), Counter[str]()

    async def meet(schema: Any, seed: int, stream: bool) -> None:
        value = written(await ask(api, form(schema), seed=seed))
        Draft202012Validator(schema, format_checker=FormatChecker()).validate(value)
        seen["valid"] += 1
        if stream:
            streamed = await ask(api, form(schema), seed=seed, stream=True)
            text = "".join(
                json.loads(line[6:])["choices"][0]["delta"].get("content", "")
                for line in streamed.text.split("\n\n")
                if line.startswith("data: {")
            )
            assert json.loads(text) == value

    @given(schema=schemas(), seed=st.integers(0, 2**32), stream=st.booleans())
    @MUCH
    def every(schema: Any, seed: int, stream: bool) -> None:
        asyncio.run(meet(schema, seed, stream))

    every()
    print(f"{seen['valid']} random schemas, every answer valid")
    assert seen["valid"] >= 200


KEYWORDS: dict[str, Any] = {
    "type": {"enum": ["object", "array", "string", "integer", "number", "boolean", "null", "x"]},
    "minimum": {"type": "integer", "minimum": -5, "maximum": 5},
    "maximum": {"type": "integer", "minimum": -5, "maximum": 5},
    "minLength": {"type": "integer", "minimum": 0, "maximum": 4},
    "maxLength": {"type": "integer", "minimum": 0, "maximum": 4},
    "minItems": {"type": "integer", "minimum": 0, "maximum": 3},
    "maxItems": {"type": "integer", "minimum": 0, "maximum": 3},
    "minProperties": {"type": "integer", "minimum": 0, "maximum": 2},
    "required": {"type": "array", "items": {"enum": ["a", "b"]}, "uniqueItems": True},
    "pattern": {"enum": ["a", "^b$", "(", "(?=x)", ".*"]},
    "format": {"enum": ["date", "ipv4", "made-up"]},
    "multipleOf": {"type": "integer", "minimum": 0, "maximum": 3},
    "enum": {"type": "array", "items": {"type": ["integer", "string", "null"]}, "maxItems": 3},
    "uniqueItems": {"type": "boolean"},
    "not": {"type": "object", "maxProperties": 0},
    "$ref": {"enum": ["#", "#/properties/a", "#/$defs/x", "http://x/y"]},
}


def soup(depth: int) -> dict[str, Any]:
    """Keywords that need not fit together."""
    known = dict(KEYWORDS)
    if depth:
        inner = soup(depth - 1)
        known |= {
            "items": inner,
            "properties": {"type": "object", "properties": {"a": inner, "b": inner}},
            "additionalProperties": {"anyOf": [{"type": "boolean"}, inner]},
            "anyOf": {"type": "array", "items": inner, "maxItems": 2},
            "oneOf": {"type": "array", "items": inner, "maxItems": 2},
            "allOf": {"type": "array", "items": inner, "maxItems": 2},
        }
    return {"type": "object", "properties": known, "additionalProperties": False}


@given(schema=from_schema(soup(1)), seed=st.integers(0, 2**32))
@settings(MUCH, max_examples=100)
async def test_any_schema_is_met_or_refused_by_name(api: Api, schema: Any, seed: int) -> None:
    answer = await ask(api, form(schema), seed=seed)
    if answer.status_code == 200:
        if answer.json()["choices"][0]["finish_reason"] == "stop":
            Draft202012Validator(schema, format_checker=FormatChecker()).validate(written(answer))
        return
    error = answer.json()["error"]
    assert answer.status_code == 400, error
    assert error["param"].startswith(PLACE), error
    if error["code"] == "unsupported_value":
        assert (
            error["param"] in error["message"]
            or error["param"].rpartition(".")[2] in (error["message"])
        )


@pytest.mark.parametrize(
    ("schema", "code", "param"),
    [
        ({"items": {"uniqueItems": True}}, "unsupported_value", ".items.uniqueItems"),
        ({"items": {"anyOf": [{}, {"not": {}}]}}, "unsupported_value", ".items.anyOf[1].not"),
        ({"if": {}, "then": {}}, "unsupported_value", ".if"),
        ({"$defs": {"x": {"contains": {}}}}, "unsupported_value", ".$defs.x.contains"),
        ({"x-guidance": {"lenient": True}}, "unsupported_value", ".x-guidance"),
        ({"oneOf": [{"type": "number"}, {"type": "integer"}]}, "unsupported_value", ".oneOf"),
        ({"items": {"pattern": "(?=a)b"}}, "unsupported_value", ".items.pattern"),
        ({"properties": {"q": {"pattern": "["}}}, "invalid_value", ".properties.q.pattern"),
        ({"items": {"const": [{"a": 2**70}]}}, "unsupported_value", ".items.const"),
        ({"type": "word"}, "invalid_value", ".type"),
        ({"properties": 3}, "invalid_value", ".properties"),
        ({"items": {"minLength": "x"}}, "invalid_value", ".items.minLength"),
        ({"properties": {"d": {"format": "made-up"}}}, "invalid_value", ".properties.d.format"),
        ({"$ref": "#/$defs/no"}, "invalid_value", ".$ref"),
        ({"properties": {"a": {"$ref": "http://x/y"}}}, "invalid_value", ".properties.a.$ref"),
        ({"type": "string", "minLength": 5, "maxLength": 3}, "invalid_value", ".minLength"),
        ({"$ref": "#"}, "invalid_value", ".$ref"),
        (
            {"properties": {"a": {"$ref": "#/$defs/n"}}, "$defs": {"n": {
                "type": "object", "required": ["n"], "properties": {"n": {"$ref": "#/$defs/n"}}}}},
            "invalid_value",
            ".$defs.n.properties.n.$ref",
        ),
        (3, "invalid_type", ""),
        (None, "missing_required_parameter", ""),
        ({"title": "x" * 300_000}, "invalid_value", ""),
    ],
)  # fmt: skip
async def test_what_cannot_be_enforced_is_named(schema: Any, code: str, param: str) -> None:
    api = make_api(max_body_bytes=1 << 20)
    error = (await ask(api, form(schema))).json()["error"]
    assert (error["code"], error["param"]) == (code, PLACE + param), error
    assert len(error["message"]) < 500
    assert api.service.opened == 0


async def test_a_schema_too_deep_is_refused_and_breaks_nothing(api: Api) -> None:
    deep: Any = {}
    for _ in range(70):
        deep = {"items": deep}
    error = (await ask(api, form(deep))).json()["error"]
    assert (error["code"], error["param"]) == ("invalid_value", PLACE)
    assert isinstance(written(await ask(api, form({"type": "object"}))), dict)


@pytest.mark.parametrize(
    ("more", "code", "param"),
    [
        ({"response_format": {"type": "xml"}}, "unsupported_value", "response_format.type"),
        (
            {"response_format": {"type": "json_schema"}},
            "missing_required_parameter",
            "response_format.json_schema",
        ),
        ({"response_format": "json"}, "invalid_type", "response_format"),
        ({**form({}), "ignore_eos": True}, "invalid_value", "ignore_eos"),
        ({**form({}), "min_tokens": 3}, "invalid_value", "min_tokens"),
        ({"tool_choice": "required"}, "invalid_value", "tool_choice"),
    ],
)
async def test_wrong_wishes(api: Api, more: dict[str, Any], code: str, param: str) -> None:
    error = (await ask(api, more)).json()["error"]
    assert (error["code"], error["param"]) == (code, param), error


async def test_json_objects_choices_stop_strings_and_log_probabilities(api: Api) -> None:
    wish = {"response_format": {"type": "json_object"}}
    answer = (await ask(api, wish, n=3, seed=1, logprobs=True)).json()
    for choice in answer["choices"]:
        assert isinstance(json.loads(choice["message"]["content"]), dict)
        assert (
            "".join(t["token"] for t in choice["logprobs"]["content"])
            == (choice["message"]["content"])
        )
    assert len({c["message"]["content"] for c in answer["choices"]}) == 3
    text = answer["choices"][0]["message"]["content"]
    cut = (await ask(api, wish, seed=1, stop=[text[5:8]])).json()["choices"][0]
    assert cut["message"]["content"] == text[: text.index(text[5:8])]
    short = (await ask(api, wish, seed=1, max_tokens=4)).json()["choices"][0]
    assert (short["finish_reason"], short["message"]["content"]) == ("length", text[:4])


# Tool calls, with DeepSeek-V4's tokens and a model that draws at random.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return v4.write_folder(tmp_path_factory.mktemp("v4"), goldens=v4.GOLDENS)


@pytest.fixture(scope="module")
def tokenizer(folder: str) -> Tokenizer:
    tokenizer = open_tokenizer(folder)
    assert tokenizer is not None
    return tokenizer


WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
        "unit": {"enum": ["C", "F"]},
        "where": {"$ref": "#/$defs/point"},
    },
    "required": ["city", "where"],
    "additionalProperties": False,
    "$defs": {
        "point": {
            "type": "object",
            "properties": {"x": {"type": "number"}, "y": {"type": "number"}},
            "required": ["x", "y"],
            "additionalProperties": False,
        }
    },
}


def tool(name: str, parameters: Any = None, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters, **more}}


TOOLS = [tool("get_weather", WEATHER, strict=True), tool("now"), tool("note", {"type": "object"})]


def draw(folder: str, tokenizer: Tokenizer, seed: int, **fields: Any) -> Answer:
    """An answer of a model whose logits are noise, with a weakness for ends."""
    body = ChatBody.model_validate(chat("x", **fields))
    encoded = open_chat(folder, tokenizer).encode(body.messages, body.chat_options())
    grammar = grammar_of(body, encoded.answer, tokenizer)
    assert grammar is not None
    grammars = LlGrammars(tokenizer, vocab_size=tokenizer.vocab_size + 7, eos=tokenizer.eos_ids)
    constraint = grammars.open(grammar)
    noise = np.random.default_rng(seed)
    ends = [tokenizer.token_id(v4.DSML), *tokenizer.eos_ids, tokenizer.token_id(v4.END_THINK)]
    ends += tokenizer.encode('"}]<>/\n')
    ids: list[int] = []
    for position in range(3000):
        row = noise.standard_normal(tokenizer.vocab_size + 7).astype(np.float32)
        row[ends] += 4
        row[ends[0]] += 3
        row[tokenizer.encode("/")] += 4
        token = sample(row, Sampling(seed=seed), position=position, allowed=constraint.allowed())
        constraint.accept(token)
        if token in tokenizer.eos_ids:
            break
        ids.append(token)
    else:
        raise AssertionError("the answer did not end")
    replayed = grammars.open(grammar, ids)
    assert (replayed.allowed() == grammars.open(grammar, ids).allowed()).all()
    return read_answer(tokenizer.decode(ids), encoded.answer)


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_a_forced_call_is_a_whole_valid_call(
    folder: str, tokenizer: Tokenizer, seed: int, thinking: bool
) -> None:
    kwargs = {"chat_template_kwargs": {"thinking": thinking}}
    answer = draw(folder, tokenizer, seed, tools=TOOLS, tool_choice="required", **kwargs)
    assert answer.content == ""
    assert bool(answer.reasoning) <= thinking
    assert answer.calls
    for call in answer.calls:
        assert call.name in ("get_weather", "now", "note")
        arguments = json.loads(call.arguments)
        if call.name == "get_weather":
            Draft202012Validator(WEATHER).validate(arguments)


@pytest.mark.parametrize("seed", range(4))
def test_a_named_function_is_called_once(folder: str, tokenizer: Tokenizer, seed: int) -> None:
    choice = {"type": "function", "function": {"name": "get_weather"}}
    answer = draw(folder, tokenizer, seed, tools=TOOLS, tool_choice=choice)
    assert [call.name for call in answer.calls] == ["get_weather"]
    Draft202012Validator(WEATHER).validate(json.loads(answer.calls[0].arguments))


@pytest.mark.parametrize("seed", range(4))
def test_strict_tools_leave_the_model_free_to_answer(
    folder: str, tokenizer: Tokenizer, seed: int
) -> None:
    answer = draw(folder, tokenizer, seed, tools=TOOLS, parallel_tool_calls=False)
    assert answer.content or answer.calls
    assert len(answer.calls) <= 1


@pytest.mark.parametrize("seed", range(4))
def test_a_schema_beside_tools_binds_the_content(
    folder: str, tokenizer: Tokenizer, seed: int
) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"],
              "additionalProperties": False}  # fmt: skip
    answer = draw(folder, tokenizer, seed, tools=TOOLS, **form(schema))
    if answer.calls:
        assert answer.content == ""
    else:
        assert json.loads(answer.content) in ({"a": True}, {"a": False})


def test_a_strict_schema_that_cannot_be_enforced_is_named(
    folder: str, tokenizer: Tokenizer
) -> None:
    wrong = tool("f", {"type": "object", "properties": {"a": {"not": {}}}}, strict=True)
    with pytest.raises(InvalidRequestError) as refused:
        draw(folder, tokenizer, 1, tools=[tool("now"), wrong])
    assert refused.value.param == "tools[1].function.parameters.properties.a.not"
