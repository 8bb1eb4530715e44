"""Reasoning, tools and tasks through HTTP, with a DeepSeek-V4 folder that has no weights.

The service says scripted tokens; their text is what a decode worker makes of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest
from api_harness import Api, served

from cluster.api import create_app
from cluster.api.fake_service import FakeService
from cluster.config import FrontSection
from decode.output import Output
from penstock.chat import open_chat
from penstock.request import StopRule
from penstock.telemetry import Telemetry
from penstock.tokenizer import Tokenizer, open_tokenizer
from tests.penstock import v4_folder as v4
from tests.penstock.v4_folder import DSML, END_THINK, EOS, calls_text, invoke

URL = "/v1/chat/completions"
CALLS = calls_text(
    invoke("get_weather", ("city", "true", "Oslo"), ("days", "false", "3")),
    invoke("get_weather", ("city", "true", 'Rome "<b>"')),
)
ANSWER = f"Two places.{END_THINK}Let me look.{CALLS}{EOS}"
THINKING = {"chat_template_kwargs": {"thinking": True}}
TOOLS = {"tools": [v4.WEATHER]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return v4.write_folder(tmp_path_factory.mktemp("v4"), goldens=v4.GOLDENS)


@pytest.fixture(scope="module")
def tokenizer(folder: str) -> Tokenizer:
    tokenizer = open_tokenizer(folder)
    assert tokenizer is not None
    return tokenizer


@pytest.fixture
def api(folder: str, tokenizer: Tokenizer) -> Api:
    service = FakeService(max_model_len=1 << 16)
    app = create_app(
        service,
        tokenizer=tokenizer,
        chat=open_chat(folder, tokenizer),
        config=FrontSection(),
        telemetry=Telemetry(),
    )
    return Api(app, service)


@pytest.fixture
async def client(api: Api) -> AsyncIterator[httpx.AsyncClient]:
    async with api.client() as client:
        yield client


def tokens_of(text: str, tokenizer: Tokenizer) -> list[tuple[int, str]]:
    """What a decode worker streams when the model writes `text`: control tokens as such."""
    output = Output(StopRule(max_tokens=10_000), tokenizer.eos_ids, tokenizer.decode_bytes)
    ids: list[int] = []
    for piece in re.split(f"({'|'.join(map(re.escape, v4.CONTROLS))})", text):
        control = tokenizer.token_id(piece) if piece in v4.CONTROLS else None
        ids += tokenizer.encode(piece) if control is None else [control]
    return [(token, output.accept(token).text) for token in ids]


def body(**more: Any) -> dict[str, Any]:
    return {"model": "fake", "messages": [{"role": "user", "content": "Oslo, Rome?"}], **more}


def events(text: str) -> list[Any]:
    lines = [line[6:] for line in text.split("\n\n") if line.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


async def test_a_whole_answer_has_reasoning_content_and_calls(
    client: httpx.AsyncClient, api: Api, tokenizer: Tokenizer
) -> None:
    api.service.plan.answer = tokens_of(ANSWER, tokenizer)
    answer = (await client.post(URL, json=body(**THINKING, **TOOLS))).json()
    choice = answer["choices"][0]
    message = choice["message"]
    assert choice["finish_reason"] == "tool_calls"
    assert message["role"] == "assistant"
    assert message["reasoning_content"] == "Two places."
    assert message["content"] == "Let me look."
    assert [c["type"] for c in message["tool_calls"]] == ["function", "function"]
    assert [c["function"] for c in message["tool_calls"]] == [
        {"name": "get_weather", "arguments": '{"city": "Oslo", "days": 3}'},
        {"name": "get_weather", "arguments": '{"city": "Rome \\"<b>\\""}'},
    ]
    assert len({c["id"] for c in message["tool_calls"]}) == 2
    written = len(api.service.plan.answer)
    assert answer["usage"]["completion_tokens"] == written
    # One token a byte, and the end mark.
    assert answer["usage"]["completion_tokens_details"] == {"reasoning_tokens": 12}


async def test_openais_client_puts_a_stream_together(api: Api, tokenizer: Tokenizer) -> None:
    api.service.plan.answer = tokens_of(ANSWER, tokenizer)
    async with served(api.app) as url:
        client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        request: Any = {
            **body(**TOOLS),
            "reasoning_effort": "high",
            "tool_choice": "auto",
        }
        whole = await client.chat.completions.create(**request)
        stream = await client.chat.completions.create(
            **request, stream=True, stream_options={"include_usage": True}
        )
        content, reasoning, reason, usage = "", "", None, None
        calls: dict[int, list[str]] = {}
        async for chunk in stream:
            usage = chunk.usage or usage
            for choice in chunk.choices:
                content += choice.delta.content or ""
                reasoning += getattr(choice.delta, "reasoning_content", None) or ""
                reason = choice.finish_reason or reason
                for call in choice.delta.tool_calls or ():
                    assert call.function is not None
                    if call.id is not None:
                        calls[call.index] = [call.function.name or "", ""]
                    calls[call.index][1] += call.function.arguments or ""
        message = whole.choices[0].message
        assert message.tool_calls is not None
        assert [[c.function.name, c.function.arguments] for c in message.tool_calls] == [  # type: ignore[union-attr]
            calls[0],
            calls[1],
        ]
        assert (content, reasoning) == (message.content, "Two places.")
        assert reason == whole.choices[0].finish_reason == "tool_calls"
        assert usage == whole.usage
        assert usage is not None
        assert usage.completion_tokens_details is not None
        assert usage.completion_tokens_details.reasoning_tokens == 12
        # What came back goes into the next request as it is.
        said = message.model_dump(exclude_none=True)
        results = [
            {"role": "tool", "tool_call_id": c.id, "content": "sun"} for c in message.tool_calls
        ]
        api.service.plan.answer = tokens_of(f"ok{END_THINK}Sun.{EOS}", tokenizer)
        request["messages"] = [*request["messages"], said, *results]
        final = await client.chat.completions.create(**request)
        assert final.choices[0].message.content == "Sun."
        assert final.choices[0].finish_reason == "stop"
        # The model's own tokens are a prefix of the next prompt: the cache holds.
        first, _, last = api.service.requests[-3:]
        grown = [*first.token_ids, *(t for t, _ in tokens_of(ANSWER, tokenizer))]
        assert list(last.token_ids[: len(grown)]) == grown
        await client.close()


async def test_a_cut_call_is_content_and_the_reason_is_the_length(
    client: httpx.AsyncClient, api: Api, tokenizer: Tokenizer
) -> None:
    whole = tokens_of(f"Hm.{CALLS}{EOS}", tokenizer)
    api.service.plan.answer = whole
    cut = CALLS[: CALLS.index("Rome") + 2]
    limit = len(tokens_of(f"Hm.{cut}", tokenizer))
    answers = []
    for stream in (False, True):
        request = body(**TOOLS, max_tokens=limit, stream=stream)
        answers.append(await client.post(URL, json=request))
    choice = answers[0].json()["choices"][0]
    assert choice["finish_reason"] == "length"
    assert len(choice["message"]["tool_calls"]) == 1
    second = cut[cut.rindex(f"<{DSML}invoke") :]
    assert choice["message"]["content"] == f"Hm.{second}"
    chunks = events(answers[1].text)[:-1]
    deltas = [c["choices"][0]["delta"] for c in chunks]
    assert "".join(d.get("content") or "" for d in deltas) == f"Hm.{second}"
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


async def test_an_unfinished_thought_counts_all_tokens_as_reasoning(
    client: httpx.AsyncClient, api: Api, tokenizer: Tokenizer
) -> None:
    api.service.plan.answer = tokens_of(ANSWER, tokenizer)
    answer = (await client.post(URL, json=body(**THINKING, max_tokens=7))).json()
    message = answer["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("Two pla", "")
    assert answer["usage"]["completion_tokens_details"] == {"reasoning_tokens": 7}


async def test_without_tools_or_with_choice_none_markup_is_content(
    client: httpx.AsyncClient, api: Api, tokenizer: Tokenizer
) -> None:
    api.service.plan.answer = tokens_of(f"Hm.{CALLS}{EOS}", tokenizer)
    prompts = []
    for more in ({}, {**TOOLS, "tool_choice": "none"}):
        choice = (await client.post(URL, json=body(**more))).json()["choices"][0]
        assert choice["message"]["content"] == f"Hm.{CALLS}"
        assert "tool_calls" not in choice["message"]
        assert choice["finish_reason"] == "stop"
        prompts.append(api.service.requests[-1].token_ids)
    assert prompts[0] == prompts[1]


async def test_evidence_and_digests_go_with_the_deltas(
    client: httpx.AsyncClient, api: Api, tokenizer: Tokenizer
) -> None:
    api.service.plan.answer = tokens_of(ANSWER, tokenizer)
    request = body(**THINKING, **TOOLS, logits_digest=True, stream=True)
    deltas = [
        c["choices"][0]["delta"] for c in events((await client.post(URL, json=request)).text)[:-1]
    ]
    ids = [token for delta in deltas for token in delta.get("token_ids", ())]
    assert ids == [token for token, _ in api.service.plan.answer]


@pytest.mark.parametrize(
    ("more", "prompt"),
    [
        ({}, END_THINK),
        ({"reasoning_effort": "none"}, END_THINK),
        ({"reasoning_effort": "low"}, v4.THINK),
        ({"chat_template_kwargs": {"enable_thinking": True}}, v4.THINK),
        ({"chat_template_kwargs": {"enable_thinking": False}}, END_THINK),
        ({"chat_template_kwargs": {"task": "title"}}, f"<{v4.BAR}title{v4.BAR}>"),
    ],
)
async def test_tokenize_shows_what_a_chat_would_send(
    client: httpx.AsyncClient, api: Api, tokenizer: Tokenizer, more: dict[str, Any], prompt: str
) -> None:
    api.service.plan.answer = tokens_of(f"x{EOS}", tokenizer)
    await client.post(URL, json=body(**more))
    sent = list(api.service.requests[-1].token_ids)
    assert sent[-1] == tokenizer.token_id(prompt)
    shown = await client.post("/tokenize", json={"messages": body()["messages"], **more})
    assert shown.json()["tokens"] == sent


@pytest.mark.parametrize(
    ("more", "code", "param"),
    [
        ({"tool_choice": "required"}, "invalid_value", "tool_choice"),
        (
            {**TOOLS, "tool_choice": {"type": "function", "function": {"name": "other"}}},
            "invalid_value",
            "tool_choice.function.name",
        ),
        (
            {**TOOLS, "tool_choice": {"type": "allowed_tools"}},
            "unsupported_value",
            "tool_choice.type",
        ),
        ({**TOOLS, "tool_choice": "perhaps"}, "invalid_value", "tool_choice"),
        ({"tools": [{"type": "function"}]}, "invalid_type", "tools[0].function"),
        ({"reasoning_effort": "huge"}, "invalid_value", "reasoning_effort"),
        ({"reasoning_effort": 3}, "invalid_type", "reasoning_effort"),
        (
            {"chat_template_kwargs": {"task": "x"}},
            "invalid_value",
            "chat_template_kwargs.task",
        ),
        (
            {"chat_template_kwargs": {"thinking": 1}},
            "invalid_type",
            "chat_template_kwargs.thinking",
        ),
        (
            {"chat_template_kwargs": {"thinking": True, "enable_thinking": False}},
            "invalid_value",
            "chat_template_kwargs.enable_thinking",
        ),
        (
            {"messages": [{"role": "tool", "content": "x", "tool_call_id": "a"}]},
            "invalid_value",
            "messages[0].tool_call_id",
        ),
    ],
)
async def test_what_cannot_be_promised_is_refused_by_name(
    client: httpx.AsyncClient, api: Api, more: dict[str, Any], code: str, param: str
) -> None:
    answer = await client.post(URL, json=body(**more))
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, code, param), error
    assert "\n" not in error["message"]
    assert api.service.opened == 0


@pytest.mark.parametrize("depth", [90, 900, 5000])
async def test_deep_json_in_a_tool_is_an_answer_or_a_refusal(
    client: httpx.AsyncClient, api: Api, tokenizer: Tokenizer, depth: int
) -> None:
    api.service.plan.answer = tokens_of(f"x{EOS}", tokenizer)
    nested = '{"a":' * depth + "1" + "}" * depth
    tool = '{"type":"function","function":{"name":"f","parameters":' + nested + "}}"
    raw = json.dumps(body())[:-1] + f',"tools":[{tool}]}}'
    answer = await client.post(URL, content=raw)
    assert answer.status_code == (200 if depth < 100 else 400), answer.text
