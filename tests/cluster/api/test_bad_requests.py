"""Everything that a client can get wrong: status, code and param, in one sentence."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from api_harness import Api, chat, make_api, served
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.api.schema import ChatBody
from penstock.errors import OverloadedError

URL = "/v1/chat/completions"
USER = [{"role": "user", "content": "hi"}]


def check(answer: httpx.Response, status: int, code: str, param: str | None) -> None:
    assert answer.headers["content-type"] == "application/json"
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (status, code, param), error
    assert set(error) == {"message", "type", "param", "code"}
    assert 10 < len(error["message"]) < 500
    assert "\n" not in error["message"]
    assert "Traceback" not in answer.text
    assert answer.headers["x-request-id"]


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        (b"", "invalid_json", None),
        (b"{", "invalid_json", None),
        (b'{"temperature": NaN}', "invalid_json", None),
        (b'{"temperature": 1e999}', "invalid_json", None),
        (b'{"model": "\\ud800"}', "invalid_json", None),
        (b"\xff\xfe", "invalid_json", None),
        (b"[" * 5000, "invalid_json", None),
        (b"[]", "invalid_type", None),
        (b"3", "invalid_type", None),
        (b"{}", "missing_required_parameter", "model"),
    ],
)
async def test_bodies_that_are_no_request(
    client: httpx.AsyncClient, body: bytes, code: str, param: str | None
) -> None:
    check(await client.post(URL, content=body), 400, code, param)


@pytest.mark.parametrize(
    ("more", "code", "param"),
    [
        ({"messages": []}, "invalid_value", "messages"),
        ({"messages": "hi"}, "invalid_type", "messages"),
        ({"messages": ["hi"]}, "invalid_type", "messages[0]"),
        ({"messages": [{}]}, "invalid_type", "messages[0].role"),
        ({"messages": [{"role": "pope", "content": "x"}]}, "invalid_value", "messages[0].role"),
        ({"messages": [{"role": "user", "content": None}]}, "invalid_type", "messages[0].content"),
        ({"messages": [{"role": "user", "content": ""}]}, "invalid_value", "messages"),
        ({"messages": [*USER, {"role": "assistant", "content": "x"}]}, "invalid_value", "messages"),
        ({"model": 3}, "invalid_type", "model"),
        ({"temperature": -0.1}, "invalid_value", "temperature"),
        ({"temperature": 2.1}, "invalid_value", "temperature"),
        ({"temperature": "0.5"}, "invalid_type", "temperature"),
        ({"temperature": True}, "invalid_type", "temperature"),
        ({"top_p": 0}, "invalid_value", "top_p"),
        ({"top_p": 1.5}, "invalid_value", "top_p"),
        ({"top_k": -2}, "invalid_value", "top_k"),
        ({"top_k": 1.5}, "invalid_type", "top_k"),
        ({"top_k": 2**40}, "invalid_value", "top_k"),
        ({"seed": "x"}, "invalid_type", "seed"),
        ({"seed": 2**63}, "invalid_value", "seed"),
        ({"max_tokens": 0}, "invalid_value", "max_tokens"),
        ({"max_tokens": -1}, "invalid_value", "max_tokens"),
        ({"max_tokens": 1.0}, "invalid_type", "max_tokens"),
        ({"max_completion_tokens": -1}, "invalid_value", "max_completion_tokens"),
        ({"max_tokens": 5000}, "context_length_exceeded", "messages"),
        ({"max_tokens": 2**62}, "context_length_exceeded", "messages"),
        (
            {"messages": [{"role": "user", "content": "x" * 5000}]},
            "context_length_exceeded",
            "messages",
        ),
        ({"max_tokens": 3, "min_tokens": 4}, "invalid_value", "min_tokens"),
        ({"min_tokens": -1}, "invalid_value", "min_tokens"),
        ({"n": 129}, "invalid_value", "n"),
        ({"n": 0}, "invalid_value", "n"),
        ({"stop": 3}, "invalid_type", "stop"),
        ({"stop": [3]}, "invalid_type", "stop[0]"),
        ({"stop": ""}, "invalid_value", "stop"),
        ({"stop": ["a"] * 17}, "invalid_value", "stop"),
        ({"stream": "yes"}, "invalid_type", "stream"),
        ({"stream_options": {"include_usage": True}}, "invalid_value", "stream_options"),
        (
            {"stream": True, "stream_options": {"include_usage": 1}},
            "invalid_type",
            "stream_options.include_usage",
        ),
        ({"tools": [{"type": "function"}]}, "unsupported_value", "tools"),
        ({"logprobs": 2}, "invalid_type", "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "invalid_value", "top_logprobs"),
        ({"logprobs": True, "top_logprobs": -1}, "invalid_value", "top_logprobs"),
        ({"top_logprobs": 2}, "invalid_value", "top_logprobs"),
        ({"response_format": {"type": "xml"}}, "unsupported_value", "response_format.type"),
        ({"logit_bias": {"a": 4}}, "invalid_value", "logit_bias"),
        ({"logit_bias": {"3": 101}}, "invalid_value", "logit_bias"),
        ({"logit_bias": {"257": 1}}, "invalid_value", "logit_bias"),
        ({"logit_bias": {"3": 1, "03": 2}}, "invalid_value", "logit_bias"),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, "invalid_value", "logit_bias"),
        ({"logit_bias": {"3": "4"}}, "invalid_type", "logit_bias.3"),
        ({"presence_penalty": 2.5}, "invalid_value", "presence_penalty"),
        ({"frequency_penalty": -2.5}, "invalid_value", "frequency_penalty"),
        ({"grounding": "strict"}, "unsupported_value", "grounding"),
        ({"grounding": "loose"}, "invalid_value", "grounding"),
        ({"cache_salt": "x" * 257}, "invalid_value", "cache_salt"),
        ({"evidence": 1}, "invalid_type", "evidence"),
    ],
)
async def test_fields_that_are_wrong(
    client: httpx.AsyncClient, more: dict[str, Any], code: str, param: str
) -> None:
    check(await client.post(URL, json={**chat(), **more}), 400, code, param)


async def test_unknown_fields_and_nulls_are_accepted(client: httpx.AsyncClient) -> None:
    body = chat(max_tokens=1, store=False, metadata={"a": "b"}, temperature=None, stop=None)
    assert (await client.post(URL, json=body)).status_code == 200


@pytest.mark.parametrize(
    ("more", "code"),
    [
        ({"prompt": ""}, "invalid_value"),
        ({"prompt": []}, "invalid_value"),
        ({"prompt": ["a"] * 65, "n": 2}, "invalid_value"),
        ({"prompt": ["a", ""]}, "invalid_value"),
        ({"prompt": [-1]}, "invalid_value"),
        ({"prompt": [257]}, "invalid_value"),
        ({"prompt": {"a": 1}}, "invalid_type"),
        ({}, "missing_required_parameter"),
    ],
)
async def test_wrong_prompts(client: httpx.AsyncClient, more: dict[str, Any], code: str) -> None:
    check(await client.post("/v1/completions", json={"model": "fake", **more}), 400, code, "prompt")


async def test_an_unknown_model_is_404(client: httpx.AsyncClient) -> None:
    check(await client.post(URL, json={**chat(), "model": "x"}), 404, "model_not_found", "model")
    check(await client.get("/v1/models/x/y"), 404, "model_not_found", "model")


async def test_unknown_routes_and_methods(client: httpx.AsyncClient) -> None:
    check(await client.post("/v1/nothing"), 404, "unknown_url", None)
    check(await client.get("/nothing"), 404, "unknown_url", None)
    check(await client.get("/%0a%ff"), 404, "unknown_url", None)
    answer = await client.get(URL)
    check(answer, 405, "method_not_allowed", None)
    assert answer.headers["allow"] == "POST"


@pytest.mark.parametrize("size", [65537, 200_000, 300_000])
async def test_a_body_over_the_limit_is_413(client: httpx.AsyncClient, size: int) -> None:
    check(await client.post(URL, content=b" " * size), 413, "request_too_large", None)


async def test_keys_are_asked_for_where_they_are_configured() -> None:
    api = make_api(api_key="right")
    async with api.client() as client:
        for given in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic right"}):
            for answer in (
                await client.post(URL, json=chat(), headers=given),
                await client.get("/v1/models", headers=given),
                await client.post("/tokenize", json={"prompt": "x"}, headers=given),
            ):
                check(answer, 401, "invalid_api_key", None)
                assert answer.headers["www-authenticate"] == "Bearer"
        for path in ("/health", "/ready", "/version", "/metrics"):
            assert (await client.get(path)).status_code == 200
        right = {"Authorization": "Bearer right"}
        assert (await client.get("/v1/models", headers=right)).status_code == 200


async def test_request_ids_are_returned_made_or_refused(client: httpx.AsyncClient) -> None:
    answer = await client.get("/health", headers={"X-Request-Id": "mine-1"})
    assert answer.headers["x-request-id"] == "mine-1"
    assert (await client.get("/health")).headers["x-request-id"].startswith("req-")
    for wrong in ("x" * 129, "a b", "\u00e9".encode()):
        answer = await client.get("/health", headers={"X-Request-Id": wrong})
        check(answer, 400, "invalid_request_id", "X-Request-Id")


async def test_one_request_too_many_is_429() -> None:
    api = make_api(max_streams=1)
    place = api.app.state.penstock.take_stream()
    async with api.client() as client:
        answer = await client.post(URL, json=chat())
        check(answer, 429, "overloaded", None)
        assert answer.headers["retry-after"] == "1"
        place.leave()
        for _ in range(3):
            assert (await client.post(URL, json=chat(max_tokens=1))).status_code == 200
            check(await client.post(URL, json=chat(n=2)), 400, "invalid_value", "n")


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_has_its_answer_has_its_place_back(stream: bool) -> None:
    """What a request still has to clean up is not held against the next one."""
    api = make_api(max_streams=1)
    api.service.plan.close_pause_s = 0.3
    async with served(api.app) as url, httpx.AsyncClient(base_url=url) as client:
        for _ in range(3):
            answer = await client.post(URL, json=chat(max_tokens=2, stream=stream))
            assert answer.status_code == 200, answer.text
        api.service.plan.refuse = OverloadedError("no worker has room")
        for _ in range(2):
            answer = await client.post(URL, json=chat(max_tokens=2, stream=stream))
            assert "no worker has room" in answer.text
    assert api.app.state.penstock._streams == 0


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20) | st.sampled_from(["user", "assistant", "system", "text", "fake"]),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(
        st.sampled_from(["role", "content", "type", "text", "include_usage"]), inner, max_size=4
    ),
    max_leaves=12,
)  # fmt: skip
FIELDS = sorted(ChatBody.model_fields)
mostly_right = st.fixed_dictionaries(
    {"model": st.just("fake"), "messages": st.just(USER), "max_tokens": st.integers(1, 4)},
    optional=dict.fromkeys(set(FIELDS) - {"messages", "model", "max_tokens"}, json_values),
)


@given(st.dictionaries(st.sampled_from(FIELDS), json_values, max_size=8) | mostly_right)
@settings(
    max_examples=250,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
async def test_no_body_makes_the_server_fail(api: Api, body: dict[str, Any]) -> None:
    async with api.client() as client:
        # The stdlib's writer also makes integers that no JSON reader needs to take.
        answer = await client.post(URL, content=json.dumps(body).encode())
    assert answer.status_code in (200, 400, 404), answer.text
    assert "internal_error" not in answer.text
    assert api.service.opened == api.service.closed
