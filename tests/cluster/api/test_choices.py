"""Several answers in one response: their order, their sum, their failures, their end."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from typing import Any

import httpx
import pytest
from api_harness import Api, chat, served

from penstock.errors import OverloadedError

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


def events(text: str) -> list[Any]:
    lines = [line[6:] for line in text.split("\n\n") if line.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


async def test_streamed_choices_are_the_whole_ones(client: httpx.AsyncClient) -> None:
    asked = chat(n=5, max_tokens=30, seed=2, logprobs=True, top_logprobs=2)
    whole = (await client.post(CHAT, json=asked)).json()
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = events((await client.post(CHAT, json={**asked, **options})).text)
    assert chunks.pop() == "[DONE]"
    assert chunks.pop()["usage"] == whole["usage"]
    for choice in whole["choices"]:
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == choice["index"]]
        assert mine[0]["delta"]["role"] == "assistant"
        text = "".join(c["delta"].get("content", "") for c in mine)
        assert text == choice["message"]["content"]
        told = [t for c in mine for t in (c["logprobs"] or {"content": []})["content"]]
        assert told == choice["logprobs"]["content"]
        assert "".join(t["token"] for t in told) == text
        assert [c["finish_reason"] for c in mine if c["finish_reason"]] == [choice["finish_reason"]]
    assert {c["choices"][0]["index"] for c in chunks} == set(range(5))


async def test_usage_counts_each_prompt_once_and_each_answer(
    client: httpx.AsyncClient, api: Api
) -> None:
    api.service.plan.cached_tokens = 2
    body = {"model": "fake", "prompt": ["abc", "defgh"], "n": 3, "max_tokens": 7}
    usage = (await client.post(TEXT, json={**body, "ignore_eos": True})).json()["usage"]
    assert usage["prompt_tokens"] == 3 + 5
    assert usage["prompt_cache_hit_tokens"] == usage["prompt_tokens_details"]["cached_tokens"] == 4
    assert usage["prompt_cache_miss_tokens"] == 4
    assert usage["completion_tokens"] == 2 * 3 * 7
    assert usage["total_tokens"] == 8 + 42


async def test_usage_after_a_retry_is_of_the_try_that_answered(
    client: httpx.AsyncClient, api: Api
) -> None:
    asked = chat(n=2, max_tokens=9, ignore_eos=True)
    first = (await client.post(CHAT, json=asked)).json()["usage"]
    api.service.plan.fail_after_tokens = 4
    assert (await client.post(CHAT, json=asked)).status_code == 500
    api.service.plan.fail_after_tokens = None
    api.service.plan.cached_tokens = 11
    again = (await client.post(CHAT, json=asked)).json()["usage"]
    assert again["prompt_cache_hit_tokens"] == 11
    assert again["prompt_tokens"] == first["prompt_tokens"]
    assert (
        again["prompt_cache_hit_tokens"] + again["prompt_cache_miss_tokens"]
        == (again["prompt_tokens"])
    )


async def test_other_choices_wait_until_the_prompt_is_read(api: Api) -> None:
    api.service.plan.prefill_pause_s = 0.15
    async with api.client() as client:
        asking = asyncio.create_task(client.post(CHAT, json=chat("x" * 3000, n=4, max_tokens=2)))
        await asyncio.sleep(0.2)
        assert api.service.opened == 1
        assert (await asking).status_code == 200
    assert api.service.opened == api.service.closed == 4


async def test_at_most_eight_answers_of_a_request_run_at_a_time(api: Api) -> None:
    api.service.plan.token_pause_s = 0.01
    most = 0
    async with api.client() as client:
        asked = chat(n=20, max_tokens=3, ignore_eos=True)
        asking = asyncio.create_task(client.post(CHAT, json=asked))
        while not asking.done():
            most = max(most, api.service.opened - api.service.closed)
            await asyncio.sleep(0.001)
    assert len(asking.result().json()["choices"]) == 20
    assert 2 < most <= 8


@pytest.mark.parametrize("stream", [False, True])
async def test_the_first_failure_ends_all(api: Api, stream: bool) -> None:
    api.service.plan.fail_after_tokens = 3
    async with api.client() as client:
        answer = await client.post(CHAT, json=chat(n=6, stream=stream, ignore_eos=True))
        assert "went away" in answer.text
        api.service.plan.fail_after_tokens = None
        api.service.plan.refuse = OverloadedError("no room")
        assert (await client.post(CHAT, json=chat(n=6, stream=stream))).status_code == 429
    assert api.service.opened == api.service.closed
    assert api.app.state.penstock._streams == 0


async def test_a_client_that_leaves_ends_all(api: Api) -> None:
    api.service.plan.token_pause_s = 0.02
    async with served(api.app) as url, httpx.AsyncClient(base_url=url) as client:
        body = chat(n=6, max_tokens=500, ignore_eos=True, stream=True)
        async with client.stream("POST", CHAT, json=body) as response:
            seen: Counter[int] = Counter()
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    seen[json.loads(line[6:])["choices"][0]["index"]] += 1
                if len(seen) == 6 and min(seen.values()) > 2:
                    break
        for _ in range(200):
            if api.service.opened == api.service.closed == 6:
                break
            await asyncio.sleep(0.01)
    assert api.service.opened == api.service.closed == 6
    assert api.app.state.penstock._streams == 0


async def test_a_prompt_of_a_list_is_answered_as_it_is_alone(client: httpx.AsyncClient) -> None:
    body = {"model": "fake", "max_tokens": 12, "seed": 5, "ignore_eos": True}
    prompts: list[Any] = [[97, 98], [99], [97, 98]]
    together = (await client.post(TEXT, json={**body, "prompt": prompts, "n": 2})).json()
    texts = [c["text"] for c in together["choices"]]
    assert texts[:2] == texts[4:]
    for i, prompt in enumerate(prompts):
        alone = (await client.post(TEXT, json={**body, "prompt": prompt, "n": 2})).json()
        assert [c["text"] for c in alone["choices"]] == texts[2 * i : 2 * i + 2]


async def test_logprobs_end_where_the_text_ends(client: httpx.AsyncClient) -> None:
    body = {"model": "fake", "prompt": "abc", "max_tokens": 60, "seed": 1, "ignore_eos": True}
    text = (await client.post(TEXT, json=body)).json()["choices"][0]["text"]
    stop = text[20:24]
    for stream in (False, True):
        asked = {**body, "stop": [stop], "logprobs": 1, "stream": stream}
        answer = await client.post(TEXT, json=asked)
        if stream:
            parts = [c["choices"][0]["logprobs"] for c in events(answer.text)[:-1]]
            tokens = [t for part in parts if part for t in part["tokens"]]
        else:
            tokens = answer.json()["choices"][0]["logprobs"]["tokens"]
        assert "".join(tokens) == text[: text.index(stop)]
