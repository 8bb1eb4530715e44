"""Every endpoint through the `openai` package, whose own types must hold what comes back."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
from api_harness import Api, served
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel

ASK: Any = {"model": "fake", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 12}
RICH: Any = {"n": 2, "logprobs": True, "top_logprobs": 2, "extra_body": {"evidence": True}}


@pytest.fixture
async def client(api: Api) -> AsyncIterator[openai.AsyncOpenAI]:
    async with (
        served(api.app) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as made,
    ):
        yield made


def holds(answer: BaseModel, kind: type[BaseModel]) -> None:
    """The client builds its objects without checking: what it built must also validate."""
    assert isinstance(answer, kind)
    kind.model_validate(answer.model_dump(), strict=True)


@pytest.mark.parametrize("more", [{}, RICH], ids=["plain", "rich"])
async def test_chat(client: openai.AsyncOpenAI, more: Any) -> None:
    whole = await client.chat.completions.create(**ASK, **more)
    holds(whole, ChatCompletion)
    assert whole.usage is not None and whole.usage.completion_tokens <= 24
    stream = await client.chat.completions.create(
        **ASK, **more, stream=True, stream_options={"include_usage": True}
    )
    usage = None
    async for chunk in stream:
        holds(chunk, ChatCompletionChunk)
        usage = chunk.usage or usage
    assert usage is not None and usage.prompt_tokens == whole.usage.prompt_tokens
    if more:
        assert len(whole.choices) == 2
        told = whole.choices[1].logprobs
        assert told is not None and told.content is not None
        assert len(told.content[0].top_logprobs) == 2


async def test_completions(client: openai.AsyncOpenAI) -> None:
    ask: Any = {"model": "fake", "prompt": ["a", "b"], "n": 2, "logprobs": 2, "max_tokens": 9}
    whole = await client.completions.create(**ask)
    holds(whole, Completion)
    assert [c.index for c in whole.choices] == [0, 1, 2, 3]
    async for chunk in await client.completions.create(**ask, stream=True):
        for choice in chunk.choices:
            # OpenAI streams null here until the end, which its own type does not have.
            choice.finish_reason = choice.finish_reason or "stop"
        holds(chunk, Completion)


async def test_models(client: openai.AsyncOpenAI) -> None:
    listed = [model async for model in client.models.list()]
    assert [model.id for model in listed] == ["fake"]
    holds(listed[0], Model)
    holds(await client.models.retrieve("fake"), Model)


async def test_errors_are_the_clients_own_classes(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        await client.completions.create(model="fake", prompt="a", suffix="b")
    assert (refused.value.code, refused.value.param) == ("unsupported_value", "suffix")
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("other")
