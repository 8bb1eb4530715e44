"""`grounding: "strict"`: the model's own answer or its refusal, and nothing else ever."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from api_harness import Api, chat, make_api
from hypothesis import given
from hypothesis import strategies as st
from test_chat_api import events
from test_tools_api import CALLS, END_THINK, EOS, TOOLS, folder, tokenizer, tokens_of

from cluster.api import create_app
from cluster.api.fake_service import FakeService
from cluster.api.grounding import MOST_HELD_TOKENS, Grounding
from cluster.config import FrontSection
from penstock.chat import ChatOptions, open_chat
from penstock.chat.encoder import AnswerForm
from penstock.request import Event, EvidenceSpan, Finish, Progress, TokenChunk, Usage
from penstock.telemetry import Telemetry
from penstock.tokenizer import ByteTokenizer, Tokenizer

__all__ = ["folder", "tokenizer"]

URL = "/v1/chat/completions"
TEXT = "Some filler. the code of bakilo is 4821. And 112, 12.5, -7 or Rue de Lyon 3. More filler."
AT = len("user: ")
REFUSAL = "UNKNOWN"


@pytest.fixture
def api() -> Api:
    api = make_api()
    api.app.state.penstock.chat.refusal = REFUSAL
    return api


def plan(api: Api, answer: str, read: str, mass: float = 0.9) -> None:
    """The model says `answer`, one token a character, and attends to `read` in the document."""
    start = AT + TEXT.index(read)
    api.service.plan.answer = [(ord(c), c) for c in answer] + [(256, "")]
    api.service.plan.answer_evidence = ((start, start + len(read), mass),)


async def ask(client: httpx.AsyncClient, **more: Any) -> dict[str, Any]:
    response = await client.post(URL, json=chat(TEXT, grounding="strict", **more))
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


@pytest.mark.parametrize(
    ("answer", "read", "verdict"),
    [
        ("4821", "is 4821.", "supported"),
        # A span that begins or ends within a word is read to the word's end.
        ("4821", "s 48", "supported"),
        (" 4821.\n", "is 4821.", "supported"),
        ("rue de lyon 3", "Rue de Lyon 3", "supported"),
        ("bakilo", "the code of bakilo", "supported"),
        ("4822", "is 4821.", "withheld"),
        ("482", "is 4821.", "withheld"),
        ("821", "is 4821.", "withheld"),
        ("12", "And 112", "withheld"),
        ("12", "112, 12.5", "withheld"),
        ("5", "112, 12.5", "withheld"),
        ("7", "12.5, -7", "withheld"),
        ("the code is 4821", "is 4821.", "withheld"),
        ("4821", "Some filler.", "withheld"),
        ("", "is 4821.", "withheld"),
        ("?!", "is 4821.", "withheld"),
        ("UNKNOWN", "Some filler.", "refused"),
        ("unknown.", "Some filler.", "refused"),
    ],
)
async def test_an_answer_that_its_evidence_does_not_contain_is_the_refusal(
    api: Api, answer: str, read: str, verdict: str
) -> None:
    plan(api, answer, read)
    async with api.client() as client:
        got = await ask(client)
        choice = got["choices"][0]
        shown = REFUSAL if verdict == "withheld" else answer
        assert choice["message"]["content"] == shown
        told = choice["message"]["grounding"]
        assert (told["mode"], told["verdict"], told["buffered"]) == ("strict", verdict, True)
        # What was generated was generated, whatever of it is shown.
        assert got["usage"]["completion_tokens"] == len(answer) + 1
        assert choice["finish_reason"] == "stop"
        response = await client.post(
            URL,
            json=chat(
                TEXT, grounding="strict", stream=True, stream_options={"include_usage": True}
            ),
        )
    chunks = events(response.text)[:-1]
    texts = [c["choices"][0]["delta"].get("content", "") for c in chunks[:-1]]
    assert "".join(texts) == shown
    assert chunks[-3]["choices"][0]["delta"]["grounding"] == told
    assert chunks[-1]["usage"] == got["usage"]


async def test_evidence_that_is_next_to_nothing_supports_nothing(api: Api) -> None:
    async with api.client() as client:
        for mass, verdict in ((0.04, "withheld"), (0.06, "supported")):
            plan(api, "4821", "is 4821.", mass)
            told = (await ask(client))["choices"][0]["message"]["grounding"]
            assert told["verdict"] == verdict


async def test_an_answer_that_was_cut_off_is_withheld_and_the_response_says_so(api: Api) -> None:
    plan(api, "4821", "is 4821.")
    async with api.client() as client:
        choice = (await ask(client, max_tokens=2))["choices"][0]
    assert choice["message"]["content"] == REFUSAL
    withheld = choice["message"]["grounding"]["withheld"]
    assert withheld == {"completion_tokens": 2, "finish_reason": "length"}


async def test_evidence_is_shown_only_if_it_is_asked_for_and_is_the_true_one(api: Api) -> None:
    async with api.client() as client:
        for answer in ("4821", "4822"):
            plan(api, answer, "is 4821.")
            plain = (await ask(client))["choices"][0]["message"]
            assert "evidence" not in plain
            shown = (await ask(client, evidence=True))["choices"][0]["message"]
            assert [s["text"] for s in shown["evidence"]] == ["is 4821."]


async def test_no_text_goes_out_before_the_check(api: Api) -> None:
    plan(api, "4821", "is 4821.")
    api.service.plan.token_pause_s = 0.08
    async with api.client() as client:
        response = await client.post(URL, json=chat(TEXT, grounding="strict", stream=True))
    # The stream lives on comments until the answer is whole; a keep-alive stands between.
    head, _, rest = response.text.partition(": keep-alive")
    assert rest
    assert '"content":"4' not in head
    assert ": prefill" in head


async def test_a_failure_and_a_disconnect_show_nothing_of_the_answer(api: Api) -> None:
    api.service.plan.fail_after_tokens = 3
    async with api.client() as client:
        response = await client.post(
            URL, json=chat(TEXT, grounding="strict", stream=True, ignore_eos=True)
        )
    chunks = events(response.text)
    assert "error" in chunks[-1]
    assert all(not c["choices"][0]["delta"].get("content") for c in chunks[:-1])
    assert api.service.opened == api.service.closed


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"logits_digest": True}, "logits_digest"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]},
            "tools",
        ),
    ],
)
async def test_what_could_give_a_withheld_answer_away_is_refused(
    api: Api, more: dict[str, Any], param: str
) -> None:
    async with api.client() as client:
        response = await client.post(URL, json=chat(TEXT, grounding="strict", **more))
    assert response.status_code == 400
    # Some models refuse the field itself before that.
    assert response.json()["error"]["param"] == param


async def test_off_changes_nothing(api: Api) -> None:
    plan(api, "4822", "is 4821.")
    async with api.client() as client:
        answer = await client.post(URL, json=chat(TEXT, grounding="off"))
    message = answer.json()["choices"][0]["message"]
    assert message["content"] == "4822"
    assert "grounding" not in message


async def test_text_completions_are_checked_too(api: Api) -> None:
    plan(api, "4821", "is 4821.")
    start = TEXT.index("is 4821.")
    api.service.plan.answer_evidence = ((start, start + 8, 0.9),)
    async with api.client() as client:
        for text, shown in ((TEXT, "4821"), (TEXT.replace("4821", "9999"), REFUSAL)):
            body = {"model": "fake", "prompt": text, "grounding": "strict"}
            choice = (await client.post("/v1/completions", json=body)).json()["choices"][0]
            assert choice["text"] == shown


def checked(
    answer: str, document: str, spans: list[EvidenceSpan], form: AnswerForm
) -> tuple[str, Grounding, list[Event]]:
    prompt = list(document.encode())
    grounding = Grounding(refusal=REFUSAL, form=form, tokenizer=ByteTokenizer(), prompt=prompt)
    usage = Usage(len(prompt), 0, len(answer))

    async def source() -> Any:
        yield Progress(1, 1, 0)
        for index, c in enumerate(answer):
            yield TokenChunk(index, (ord(c) % 256,), c, tuple(spans))
        yield Finish("stop", usage)

    async def run() -> list[Event]:
        return [event async for event in grounding.events(source())]

    got = asyncio.run(run())
    text = "".join(e.text for e in got if isinstance(e, TokenChunk | Finish))
    assert isinstance(got[-1], Finish) and got[-1].usage == usage
    return text, grounding, got


@given(
    st.text("ab1 .", max_size=6),
    st.text("ab1 .", min_size=1, max_size=30),
    st.lists(
        st.builds(
            lambda start, size, mass: EvidenceSpan(start, start + size, mass),
            st.integers(0, 25),
            st.integers(1, 8),
            st.floats(0.01, 1.0),
        ),
        max_size=4,
    ),
    st.booleans(),
)
def test_the_result_is_the_answer_or_the_refusal_and_what_is_supported_stands_in_the_document(
    answer: str, document: str, spans: list[EvidenceSpan], thinking: bool
) -> None:
    spans = [s for s in spans if s.end <= len(document)]
    text, grounding, got = checked(answer, document, spans, AnswerForm(thinking=thinking))
    withheld = f"</think>{REFUSAL}" if thinking else REFUSAL
    verdict = grounding.told["verdict"]
    assert text == (withheld if verdict == "withheld" else answer)
    if verdict == "supported":
        words = " ".join(answer.split()).strip(" .")
        assert words and words in " ".join(document.split())
    ids = [i for e in got if isinstance(e, TokenChunk) for i in e.token_ids]
    assert ids == [ord(c) % 256 for c in answer]


def test_an_answer_longer_than_any_evidence_is_not_kept_in_memory() -> None:
    answer = "a" * (MOST_HELD_TOKENS + 10)
    text, grounding, got = checked(answer, "a " * 20, [EvidenceSpan(0, 8, 0.9)], AnswerForm())
    assert (text, grounding.told["verdict"]) == (REFUSAL, "withheld")
    assert len(got) == 3


@pytest.mark.parametrize(("said", "verdict"), [("4821", "supported"), ("4822", "withheld")])
async def test_reasoning_is_withheld_with_its_answer_and_still_counted(
    folder: str, tokenizer: Tokenizer, said: str, verdict: str
) -> None:
    service = FakeService(max_model_len=1 << 16)
    encoder = open_chat(folder, tokenizer)
    encoder.refusal = REFUSAL
    app = create_app(
        service,
        tokenizer=tokenizer,
        chat=encoder,
        config=FrontSection(),
        telemetry=Telemetry(),
    )
    service.plan.answer = tokens_of(f"I read 4821.{END_THINK}{said}{EOS}", tokenizer)
    body = chat(TEXT, grounding="strict", chat_template_kwargs={"thinking": True})
    ids = encoder.encode(body["messages"], ChatOptions(thinking=True)).token_ids
    digits = tokenizer.encode("4821")
    start = next(n for n in range(len(ids)) if tokenizer.decode(ids[n:]).startswith("4821"))
    service.plan.answer_evidence = ((start, start + len(digits), 0.9),)
    async with Api(app, service).client() as client:
        got = (await client.post(URL, json=body)).json()
        calls = tokens_of(f"no{END_THINK}4821{CALLS}{EOS}", tokenizer)
        service.plan.answer = calls
        tools = {"role": "system", "content": "", **TOOLS}
        with_tools = body | {"messages": [tools, *body["messages"]]}
        called = (await client.post(URL, json=with_tools)).json()["choices"][0]
    message = got["choices"][0]["message"]
    assert message["grounding"]["verdict"] == verdict
    shown = {"supported": ("I read 4821.", said), "withheld": ("", REFUSAL)}[verdict]
    assert (message["reasoning_content"], message["content"]) == shown
    usage = got["usage"]["completion_tokens_details"]["reasoning_tokens"]
    assert usage == len(tokenizer.encode("I read 4821.")) + 1
    # An answer that is a call as well is no text of the document.
    assert called["message"]["content"] == REFUSAL
    assert "tool_calls" not in called["message"]
    assert called["finish_reason"] == "stop"


async def test_several_choices_are_checked_each_by_itself(api: Api) -> None:
    """The scripted service says the same each time; what it must not do is share the check."""
    plan(api, "4821", "is 4821.")
    async with api.client() as client:
        whole = await ask(client, n=3, evidence=True)
        body = chat(TEXT, grounding="strict", n=3, stream=True)
        stream = events((await client.post(URL, json=body)).text)[:-1]
    assert [c["message"]["content"] for c in whole["choices"]] == ["4821"] * 3
    for choice in whole["choices"]:
        assert choice["message"]["grounding"]["verdict"] == "supported"
        (span,) = choice["message"]["evidence"]
        assert span["weight"] == pytest.approx(0.9)
    told = {
        c["choices"][0]["index"]: c["choices"][0]["delta"]["grounding"]["verdict"]
        for c in stream
        if "grounding" in c["choices"][0]["delta"]
    }
    assert told == dict.fromkeys(range(3), "supported")
