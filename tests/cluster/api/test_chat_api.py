"""The chat endpoint through HTTP: whole and streamed answers, usage, evidence, seeds, errors."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest
from api_harness import Api, chat, make_api, served

from penstock.errors import OverloadedError

URL = "/v1/chat/completions"


def events(text: str) -> list[Any]:
    """Data of an SSE body; comments apart."""
    lines = [line[6:] for line in text.split("\n\n") if line.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


async def test_a_whole_answer_has_openais_shape(client: httpx.AsyncClient, api: Api) -> None:
    api.service.plan.cached_tokens = 5
    answer = await client.post(URL, json=chat(max_tokens=8, temperature=0, ignore_eos=True))
    assert answer.status_code == 200
    body = answer.json()
    assert body["object"] == "chat.completion"
    assert body["choices"][0]["finish_reason"] == "length"
    assert len(body["choices"][0]["message"]["content"]) == 8
    prompt = len("user: hello\nassistant: ")
    assert body["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": 8,
        "total_tokens": prompt + 8,
        "prompt_tokens_details": {"cached_tokens": 5},
        "prompt_cache_hit_tokens": 5,
        "prompt_cache_miss_tokens": prompt - 5,
    }
    assert len(body["system_fingerprint"]) == 64
    assert {"ttft_s", "e2e_s"} <= set(body["timings"])


async def test_a_stream_says_the_same_as_a_whole_answer(client: httpx.AsyncClient) -> None:
    settings: dict[str, Any] = {"max_tokens": 30, "seed": 7, "ignore_eos": True}
    whole = (await client.post(URL, json=chat(**settings))).json()
    options = {"stream": True, "stream_options": {"include_usage": True}}
    answer = await client.post(URL, json=chat(**settings, **options))
    assert answer.headers["content-type"].startswith("text/event-stream")
    chunks = events(answer.text)
    assert chunks[-1] == "[DONE]"
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    text = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks[:-2])
    assert text == whole["choices"][0]["message"]["content"]
    assert chunks[-3]["choices"][0]["finish_reason"] == "length"
    assert chunks[-2]["usage"] == whole["usage"]
    assert chunks[-2]["choices"] == []
    assert all(c["usage"] is None for c in chunks[:-2])
    assert len({c["id"] for c in chunks[:-1]}) == 1
    assert ": prefill 23/23 cached 0" in answer.text


async def test_without_include_usage_no_chunk_has_usage(client: httpx.AsyncClient) -> None:
    answer = await client.post(URL, json=chat(max_tokens=3, stream=True))
    assert all("usage" not in c for c in events(answer.text)[:-1])


async def test_evidence_names_spans_of_the_prompt(client: httpx.AsyncClient) -> None:
    text = "the code of bakilo is 1234. " * 4
    settings: dict[str, Any] = {
        "max_tokens": 4,
        "evidence": True,
        "temperature": 0,
        "ignore_eos": True,
    }
    body = (await client.post(URL, json=chat(text, **settings))).json()
    found = body["choices"][0]["message"]["evidence"]
    prompt = f"user: {text}\nassistant: "
    assert found
    for span in found:
        assert span["text"] == prompt[span["start"] : span["end"]]
        assert span["mass"] == 1.0
        assert text[span["char_start"] : span["char_end"]] in span["text"]
        assert span["message"] == 0
    # The fake attends to one entry a token.
    assert sum(span["weight"] for span in found) == pytest.approx(1.0)
    answer = await client.post(URL, json=chat(text, stream=True, **settings))
    streamed = [
        span
        for c in events(answer.text)[:-1]
        for span in c["choices"][0]["delta"].get("evidence", ())
    ]
    tokens = [
        {t for s in spans for t in range(s["start"], s["end"])} for spans in (streamed, found)
    ]
    assert tokens[0] == tokens[1]
    last = events(answer.text)[-3]["choices"][0]["delta"]
    assert last == {"content": "", "answer_evidence": found}
    without = (await client.post(URL, json=chat(text, stream=True, max_tokens=4))).text
    assert "evidence" not in without


async def test_equal_seeds_give_equal_answers_and_no_seed_gives_a_fresh_one(
    client: httpx.AsyncClient, api: Api
) -> None:
    texts = []
    for seed in (3, 3, -3, None, None):
        body = chat(max_tokens=40, seed=seed, ignore_eos=True)
        texts.append((await client.post(URL, json=body)).json()["choices"][0]["message"]["content"])
    assert texts[0] == texts[1]
    assert len(set(texts)) == 4
    assert api.service.requests[2].sampling.seed == 2**64 - 3


async def test_cache_salt_and_key_separate_namespaces() -> None:
    api = make_api(api_key="one,two")
    seen = []
    async with api.client() as client:
        for key, salt in (("one", None), ("one", "s"), ("two", None), ("one", None)):
            answer = await client.post(
                URL,
                json=chat(max_tokens=1, cache_salt=salt),
                headers={"Authorization": f"Bearer {key}"},
            )
            assert answer.status_code == 200
            seen.append(api.service.requests[-1].namespace)
    assert len(set(seen)) == 3
    assert seen[0] == seen[3]


async def test_without_max_tokens_the_answer_takes_what_fits(api: Api) -> None:
    async with api.client() as client:
        await client.post(URL, json=chat(min_tokens=2))
        assert api.service.requests[-1].stop.max_tokens == 1024
        await client.post(URL, json=chat("x" * 4000, ignore_eos=True))
        assert api.service.requests[-1].total_tokens == 4096


async def test_a_refusal_before_the_first_event_keeps_its_status(
    client: httpx.AsyncClient, api: Api
) -> None:
    api.service.plan.refuse = OverloadedError("no room", retry_after_s=2.5)
    for stream in (True, False):
        answer = await client.post(URL, json=chat(stream=stream))
        assert answer.status_code == 429
        assert answer.headers["retry-after"] == "3"
        assert answer.json()["error"] == {
            "message": "no room",
            "type": "rate_limit_error",
            "param": None,
            "code": "overloaded",
        }


async def test_a_failure_after_the_headers_is_an_error_event(
    client: httpx.AsyncClient, api: Api
) -> None:
    api.service.plan.fail_after_tokens = 2
    answer = await client.post(URL, json=chat(stream=True, ignore_eos=True))
    assert answer.status_code == 200
    assert events(answer.text)[-1]["error"]["code"] == "worker_unavailable"
    whole = await client.post(URL, json=chat(ignore_eos=True))
    assert whole.status_code == 500


@pytest.mark.parametrize("stream", [True, False])
async def test_a_bug_shows_no_traceback(client: httpx.AsyncClient, api: Api, stream: bool) -> None:
    api.service.plan.break_after_tokens = 1
    answer = await client.post(URL, json=chat(stream=stream, ignore_eos=True))
    error = events(answer.text)[-1]["error"] if stream else answer.json()["error"]
    assert error["code"] == "internal_error"
    assert "on purpose" not in answer.text
    assert "Traceback" not in answer.text


async def test_a_silent_prefill_is_bridged_by_comments(api: Api) -> None:
    api.service.plan.prefill_pause_s = 0.35
    async with api.client() as client:
        answer = await client.post(URL, json=chat(max_tokens=1, stream=True))
    assert answer.text.count(": keep-alive") >= 2
    assert events(answer.text)[-1] == "[DONE]"


async def test_the_deadline_ends_a_request() -> None:
    api = make_api(request_timeout_s=0.2)
    api.service.plan.prefill_pause_s = 5.0
    async with api.client() as client:
        answer = await client.post(URL, json=chat())
    assert answer.status_code == 504
    assert answer.json()["error"]["code"] == "deadline_exceeded"
    assert api.service.opened == api.service.closed == 1


async def test_completions_take_text_and_token_ids(client: httpx.AsyncClient) -> None:
    body: dict[str, Any] = {"model": "fake", "max_tokens": 6, "temperature": 0, "ignore_eos": True}
    texts = []
    for prompt in ("ab", [97, 98], ["ab"], [[97, 98]]):
        answer = await client.post("/v1/completions", json={**body, "prompt": prompt})
        assert answer.status_code == 200, answer.text
        texts.append(answer.json()["choices"][0]["text"])
    assert len(set(texts)) == 1
    answer = await client.post("/v1/completions", json={**body, "prompt": "ab", "stream": True})
    chunks = events(answer.text)
    assert "".join(c["choices"][0]["text"] for c in chunks[:-1]) == texts[0]


async def test_the_openai_client_works_over_a_socket(api: Api) -> None:
    async with served(api.app) as url:
        client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        listed = await client.models.list()
        assert [m.id for m in listed.data] == ["fake"]
        whole = await client.chat.completions.create(
            model="fake", messages=[{"role": "user", "content": "hi"}], max_tokens=9, seed=1
        )
        stream = await client.chat.completions.create(
            model="fake",
            messages=[{"role": "user", "content": "hi"}],
            max_tokens=9,
            seed=1,
            stream=True,
            stream_options={"include_usage": True},
        )
        text, usage = "", None
        async for chunk in stream:
            text += (chunk.choices[0].delta.content or "") if chunk.choices else ""
            usage = chunk.usage or usage
        assert text == whole.choices[0].message.content
        assert usage == whole.usage
        with pytest.raises(openai.NotFoundError, match="not served here"):
            await client.models.retrieve("other")
        api.service.plan.fail_after_tokens = 1
        with pytest.raises(openai.APIError, match="went away"):
            async for _ in await client.chat.completions.create(
                model="fake",
                messages=[{"role": "user", "content": "hi"}],
                stream=True,
                extra_body={"ignore_eos": True},
            ):
                pass
        await client.close()
