"""docs/openai.md's table of parameters, row by row through HTTP."""

from __future__ import annotations

import json
import typing
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import httpx
import pytest
from api_harness import CONTEXT, Api, chat, make_api
from openai.types import completion_create_params as text_params
from openai.types.chat import completion_create_params as chat_params

from cluster.api import fields
from cluster.api.schema import ChatBody, CompletionBody

DOC = Path(__file__).parents[3] / "docs" / "openai.md"
PATHS = {"chat": "/v1/chat/completions", "text": "/v1/completions"}
# What every request of this module says, so that answers can be compared.
PLAIN: dict[str, Any] = {"seed": 3, "max_tokens": 40, "ignore_eos": True}
BODIES: dict[str, dict[str, Any]] = {
    "chat": chat(**PLAIN),
    "text": {"model": "fake", "prompt": "hello", **PLAIN},
}


@dataclass(frozen=True)
class Row:
    name: str
    endpoint: str
    here: str
    sent: Any

    def __str__(self) -> str:
        return f"{self.endpoint}-{self.name}"


def rows() -> Iterator[Row]:
    for line in DOC.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if line.startswith("| `") and len(cells) >= 4:
            for endpoint in cells[1].split(", "):
                yield Row(cells[0].strip("`"), endpoint, cells[2], json.loads(cells[3].strip("`")))


ROWS = list(rows())


def of(here: str) -> list[Row]:
    return [row for row in ROWS if row.here == here]


async def ask(api: Api, endpoint: str, **fields: Any) -> httpx.Response:
    async with api.client() as client:
        return await client.post(PATHS[endpoint], json={**BODIES[endpoint], **fields})


def texts(answer: httpx.Response) -> list[str]:
    assert answer.status_code == 200, answer.text
    return [c["text"] if "text" in c else c["message"]["content"] for c in answer.json()["choices"]]


async def plain(api: Api, endpoint: str) -> str:
    return texts(await ask(api, endpoint))[0]


@pytest.mark.parametrize("row", of("ignored"), ids=str)
async def test_what_is_ignored_changes_nothing(row: Row, api: Api) -> None:
    got = texts(await ask(api, row.endpoint, **{row.name: row.sent}))
    assert got == [await plain(api, row.endpoint)]


@pytest.mark.parametrize("row", of("refused"), ids=str)
async def test_what_is_refused_is_named(row: Row, api: Api) -> None:
    for stream in (False, True):
        answer = await ask(api, row.endpoint, **{row.name: row.sent, "stream": stream})
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (400, "unsupported_value"), error
        assert error["param"] == row.name
        assert row.name in error["message"]
    absent = await ask(api, row.endpoint, **{row.name: None})
    assert texts(absent) == [await plain(api, row.endpoint)]
    assert api.service.opened == api.service.closed == 2


@pytest.mark.parametrize(
    ("table", "endpoint"), [(fields.CHAT, "chat"), (fields.TEXT, "text")], ids=["chat", "text"]
)
async def test_neutral_values_of_refused_fields_are_accepted(
    table: dict[str, tuple[Any, ...]], endpoint: str, api: Api
) -> None:
    want = await plain(api, endpoint)
    for name, neutral in table.items():
        for value in neutral:
            assert texts(await ask(api, endpoint, **{name: value})) == [want], name


def test_the_table_is_complete() -> None:
    listed = {(row.name, row.endpoint) for row in ROWS}
    assert {row.here for row in ROWS} == {"supported", "ignored", "refused"}
    assert len(listed) == len(ROWS), "a row stands twice"
    known = {
        "chat": typing.get_type_hints(chat_params.CompletionCreateParamsBase),
        "text": typing.get_type_hints(text_params.CompletionCreateParamsBase),
    }
    ours = {"chat": ChatBody.model_fields, "text": CompletionBody.model_fields}
    refused = {"chat": fields.CHAT, "text": fields.TEXT}
    for endpoint in PATHS:
        names = {*known[endpoint], *ours[endpoint]} | (set(refused[endpoint]) - {"echo"})
        # Chat has no best_of; it is refused there as on the other endpoint.
        missing = {(name, endpoint) for name in names - {"best_of"}} - listed
        assert not missing
    assert {(row.name, row.endpoint) for row in of("supported")} == set(CHECKS)


Check = Callable[[Api, str, Any], Awaitable[None]]
CHECKS: dict[tuple[str, str], Check] = {}


def checks(name: str, *endpoints: str) -> Callable[[Check], Check]:
    def register(check: Check) -> Check:
        CHECKS.update({(name, endpoint): check for endpoint in endpoints})
        return check

    return register


@pytest.mark.parametrize("row", of("supported"), ids=str)
async def test_what_is_supported_does_it(row: Row, api: Api) -> None:
    await CHECKS[row.name, row.endpoint](api, row.endpoint, row.sent)


@checks("model", "chat", "text")
async def _model(api: Api, endpoint: str, sent: Any) -> None:
    assert (await ask(api, endpoint, model=sent)).json()["model"] == sent
    assert (await ask(api, endpoint, model="other")).status_code == 404


@checks("messages", "chat")
async def _messages(api: Api, endpoint: str, sent: Any) -> None:
    await ask(api, endpoint, messages=sent)
    assert bytes(api.service.requests[-1].token_ids) == b"user: hi\nassistant: "


@checks("prompt", "text")
async def _prompt(api: Api, endpoint: str, sent: Any) -> None:
    together = texts(await ask(api, endpoint, prompt=sent))
    apart = [texts(await ask(api, endpoint, prompt=each))[0] for each in sent]
    assert together == apart
    assert len(set(apart)) == 2


@checks("stream", "chat", "text")
async def _stream(api: Api, endpoint: str, sent: Any) -> None:
    answer = await ask(api, endpoint, stream=sent)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.text.endswith("data: [DONE]\n\n")


@checks("stream_options", "chat", "text")
async def _stream_options(api: Api, endpoint: str, sent: Any) -> None:
    answer = await ask(api, endpoint, stream=True, stream_options=sent)
    last = json.loads(answer.text.split("data: ")[-2])
    assert last["usage"]["completion_tokens"] == 40
    assert (await ask(api, endpoint, stream_options=sent)).status_code == 400


@checks("temperature", "chat", "text")
@checks("top_k", "chat", "text")
async def _greedy(api: Api, endpoint: str, sent: Any) -> None:
    name = "temperature" if sent == 0 else "top_k"
    greedy = texts(await ask(api, endpoint, temperature=0))
    assert texts(await ask(api, endpoint, **{name: sent})) == greedy
    assert greedy != [await plain(api, endpoint)]


@checks("top_p", "chat", "text")
async def _top_p(api: Api, endpoint: str, sent: Any) -> None:
    tight = texts(await ask(api, endpoint, top_p=sent))
    assert tight == texts(await ask(api, endpoint, temperature=0))
    assert tight != [await plain(api, endpoint)]


@checks("seed", "chat", "text")
async def _seed(api: Api, endpoint: str, sent: Any) -> None:
    first = texts(await ask(api, endpoint, seed=sent))
    assert first == texts(await ask(api, endpoint, seed=sent))
    assert first != [await plain(api, endpoint)]


@checks("n", "chat", "text")
async def _n(api: Api, endpoint: str, sent: Any) -> None:
    answer = await ask(api, endpoint, n=sent)
    got = texts(answer)
    assert len(set(got)) == len(got) == sent
    assert got[0] == await plain(api, endpoint)
    assert [c["index"] for c in answer.json()["choices"]] == list(range(sent))


@checks("max_tokens", "chat", "text")
@checks("max_completion_tokens", "chat")
async def _max_tokens(api: Api, endpoint: str, sent: Any) -> None:
    name = "max_tokens" if endpoint == "text" else "max_completion_tokens"
    answer = (await ask(api, endpoint, **{name: sent})).json()
    assert answer["usage"]["completion_tokens"] == sent
    assert answer["choices"][0]["finish_reason"] == "length"
    assert (await ask(api, endpoint, **{name: CONTEXT})).status_code == 400


@checks("stop", "chat", "text")
async def _stop(api: Api, endpoint: str, sent: Any) -> None:
    text = await plain(api, endpoint)
    assert set(sent) & set(text)
    answer = await ask(api, endpoint, stop=sent)
    assert texts(answer) == [text[: min(text.index(s) for s in sent if s in text)]]
    assert answer.json()["choices"][0]["finish_reason"] == "stop"


@checks("logprobs", "chat", "text")
@checks("top_logprobs", "chat")
async def _logprobs(api: Api, endpoint: str, sent: Any) -> None:
    if endpoint == "chat":
        more = {"logprobs": True} | ({} if sent is True else {"top_logprobs": sent})
        answer = (await ask(api, endpoint, **more)).json()["choices"][0]
        told = answer["logprobs"]["content"]
        assert "".join(t["token"] for t in told) == answer["message"]["content"]
        assert all(len(t["top_logprobs"]) == (0 if sent is True else sent) for t in told)
        assert all(t["logprob"] < 0 and t["token"].encode() == bytes(t["bytes"]) for t in told)
    else:
        answer = (await ask(api, endpoint, logprobs=sent)).json()["choices"][0]
        told = answer["logprobs"]
        assert "".join(told["tokens"]) == answer["text"]
        lengths = [len(token) for token in told["tokens"]]
        assert told["text_offset"] == [0, *accumulate(lengths)][:-1]
        assert all(sent <= len(top) <= sent + 1 for top in told["top_logprobs"])


@checks("echo", "text")
async def _echo(api: Api, endpoint: str, sent: Any) -> None:
    text = await plain(api, endpoint)
    assert texts(await ask(api, endpoint, echo=sent)) == ["hello" + text]
    streamed = await ask(api, endpoint, echo=sent, stream=True)
    chunks = [json.loads(c[6:]) for c in streamed.text.split("\n\n") if c.startswith("data: {")]
    assert "".join(c["choices"][0]["text"] for c in chunks) == "hello" + text


@checks("frequency_penalty", "chat", "text")
@checks("presence_penalty", "chat", "text")
async def _penalty(api: Api, endpoint: str, sent: Any) -> None:
    text = await plain(api, endpoint)
    for name in ("frequency_penalty", "presence_penalty"):
        assert len(set(texts(await ask(api, endpoint, **{name: sent}))[0])) > len(set(text))


@checks("logit_bias", "chat", "text")
async def _logit_bias(api: Api, endpoint: str, sent: Any) -> None:
    assert texts(await ask(api, endpoint, logit_bias=sent)) == ["z" * 40]


@checks("ignore_eos", "chat", "text")
@checks("min_tokens", "chat", "text")
async def _longer(api: Api, endpoint: str, sent: Any) -> None:
    for seed in range(100):
        own = (await ask(api, endpoint, seed=seed, ignore_eos=None)).json()
        if own["usage"]["completion_tokens"] < 20:
            break
    wish: dict[str, Any] = {"ignore_eos": sent} if sent is True else {"min_tokens": sent}
    longer = (await ask(api, endpoint, seed=seed, **{"ignore_eos": None, **wish})).json()
    assert own["usage"]["completion_tokens"] < 20 <= longer["usage"]["completion_tokens"]


@checks("evidence", "chat", "text")
async def _evidence(api: Api, endpoint: str, sent: Any) -> None:
    choice = (await ask(api, endpoint, evidence=sent)).json()["choices"][0]
    assert choice.get("message", choice)["evidence"]


@checks("cache_salt", "chat", "text")
async def _cache_salt(api: Api, endpoint: str, sent: Any) -> None:
    for salt in (sent, None, sent):
        assert texts(await ask(api, endpoint, cache_salt=salt)) == [await plain(api, endpoint)]
    first, _, plain_one, *_, last, _ = [r.namespace for r in api.service.requests]
    assert first == last != plain_one


@checks("priority", "chat", "text")
async def _priority(api: Api, endpoint: str, sent: Any) -> None:
    for value in (sent, "normal", "batch", -1, 0, 7, None):
        assert texts(await ask(api, endpoint, priority=value)) == [await plain(api, endpoint)]
    classes = [int(r.priority) for r in api.service.requests[::2]]
    assert classes == [0, 1, 2, 0, 1, 2, 1]
    assert (await ask(api, endpoint, priority="soon")).status_code == 400
    # An opaque tag, the same for all salts.
    (tag,) = {r.tenant for r in api.service.requests}
    assert len(tag) == 16


@checks("logits_digest", "chat", "text")
async def _logits_digest(api: Api, endpoint: str, sent: Any) -> None:
    choice = (await ask(api, endpoint, logits_digest=sent)).json()["choices"][0]
    assert len(choice["token_ids"]) == len(set(choice["logits_digests"])) == 40


@checks("response_format", "chat")
async def _response_format(api: Api, endpoint: str, sent: Any) -> None:
    bias = {str(ord('"')): 37, str(ord("}")): 36}
    free = {"ignore_eos": None, "max_tokens": 1000, "logit_bias": bias}
    for seed in range(5):
        (text,) = texts(await ask(api, endpoint, response_format=sent, seed=seed, **free))
        assert isinstance(json.loads(text), dict)


@checks("grounding", "chat", "text")
async def _grounding(api: Api, endpoint: str, sent: Any) -> None:
    refused = await ask(api, endpoint, grounding=sent)
    assert refused.json()["error"]["param"] == "grounding"
    api.app.state.penstock.chat.refusal = "UNKNOWN"
    choice = (await ask(api, endpoint, grounding=sent)).json()["choices"][0]
    assert choice.get("message", choice)["grounding"]["mode"] == sent


@checks("tools", "chat")
@checks("tool_choice", "chat")
@checks("parallel_tool_calls", "chat")
@checks("reasoning_effort", "chat")
@checks("chat_template_kwargs", "chat")
async def _of_the_model(api: Api, endpoint: str, sent: Any) -> None:
    """What they do with a model that has them: test_tools_api.py. One that has not says so."""
    accepted = {"tool_choice": "none", "parallel_tool_calls": True}
    for name, value in accepted.items():
        if sent == value:
            assert texts(await ask(api, endpoint, **{name: sent})) == [await plain(api, endpoint)]
            return
    kinds = {list: "tools", str: "reasoning_effort", dict: "chat_template_kwargs"}
    name = kinds[type(sent)]
    error = (await ask(api, endpoint, **{name: sent})).json()["error"]
    assert error["code"] == "unsupported_value"
    assert error["param"].startswith(name)


async def test_every_choice_counts_as_a_stream_of_the_front() -> None:
    api = make_api(max_streams=4)
    assert len(texts(await ask(api, "chat", n=4))) == 4
    refused = await ask(api, "chat", n=5)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "n")
    place = api.app.state.penstock.take_stream()
    assert (await ask(api, "chat", n=4)).status_code == 429
    place.leave()
    assert len(texts(await ask(api, "text", prompt=["a", "b"], n=2))) == 4
    assert api.app.state.penstock._streams == 0
