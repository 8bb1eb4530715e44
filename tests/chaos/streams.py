"""Streaming requests for the chaos of a cluster, and clients that read them to the end."""

from __future__ import annotations

import asyncio
import json
import random
import time
from dataclasses import dataclass, field
from typing import Any

import httpx

from model.engine import Segment
from model.fake import FakeEngine
from model.sampler import sample
from penstock.request import Sampling
from tests.cluster.breakage import prompt_of


@dataclass(frozen=True)
class Asked:
    """One request; what it draws is a function of this."""

    number: int
    prompt: tuple[int, ...]
    max_tokens: int
    temperature: float
    seed: int

    def body(self, model: str) -> dict[str, Any]:
        return {
            "model": model,
            "prompt": list(self.prompt),
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "seed": self.seed,
            "ignore_eos": True,
            "stream": True,
            "logits_digest": True,
        }


@dataclass
class Read:
    """What a client got of it, and when."""

    asked: Asked
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    errors: list[str] = field(default_factory=list)
    reconnects: int = 0
    longest_pause_s: float = 0.0
    """Between two of its token events."""
    first_token_s: float = 0.0


def draw_requests(
    seed: int, count: int, *, longest: int = 30_000, answer: tuple[int, int] = (100, 500)
) -> list[Asked]:
    """Prompts of 1,000 to `longest` tokens, short ones more often; a third share a document."""
    chosen = random.Random(seed)
    document = prompt_of(min(8_000, longest // 2), 900 + seed)
    asked = []
    for number in range(count):
        length = int(1_000 * (longest / 1_000) ** chosen.random())
        own = prompt_of(length, 1_000 * (seed + 1) + number)
        if number % 3 == 0:
            own = [*document, *own[: max(200, length // 8)]]
        drawn = number % 2
        asked.append(
            Asked(
                number,
                tuple(own),
                chosen.randint(*answer),
                0.9 if drawn else 0.0,
                chosen.randrange(2**31) if drawn else 0,
            )
        )
    return asked


def fake_tokens(asked: Asked) -> list[int]:
    """What `fake` draws undisturbed, computed here alone."""
    engine = FakeEngine()
    sequence = engine.open(len(asked.prompt) + asked.max_tokens)
    engine.forward([Segment(sequence, asked.prompt)])
    sampling = Sampling(temperature=asked.temperature, seed=asked.seed)
    tokens: list[int] = []
    for _ in range(asked.max_tokens):
        row = engine.logits([sequence]).row(0)
        tokens.append(sample(row, sampling, position=sequence.position))
        engine.forward([Segment(sequence, [tokens[-1]])])
    return tokens


class Client:
    """Reads streams side by side. Goes to another front, or to the same one again, if one dies."""

    def __init__(self, urls: list[str], model: str, *, timeout_s: float = 120.0) -> None:
        self._urls = urls
        self._model = model
        self._timeout_s = timeout_s
        self._http = httpx.AsyncClient(timeout=timeout_s, limits=httpx.Limits(max_connections=None))

    async def read_all(self, every: list[Asked], *, at_once: int) -> list[Read]:
        places = asyncio.Semaphore(at_once)

        async def one(asked: Asked) -> Read:
            async with places:
                return await self.read(asked)

        return list(await asyncio.gather(*(one(asked) for asked in every)))

    async def read(self, asked: Asked) -> Read:
        read = Read(asked)
        begun = last = time.monotonic()
        url = self._urls[asked.number % len(self._urls)]
        body = asked.body(self._model)
        try:
            async with self._http.stream("POST", f"{url}/v1/completions", json=body) as answer:
                if answer.status_code != 200:
                    read.errors.append((await answer.aread()).decode()[:300])
                    return read
                async for line in answer.aiter_lines():
                    if not line.startswith("data: ") or line == "data: [DONE]":
                        continue
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        read.errors.append(str(event["error"]))
                        return read
                    fresh = [t for c in event["choices"] for t in c.get("token_ids") or []]
                    for choice in event["choices"]:
                        read.finish_reason = choice.get("finish_reason") or read.finish_reason
                    if fresh:
                        now = time.monotonic()
                        if read.token_ids:
                            read.longest_pause_s = max(read.longest_pause_s, now - last)
                        else:
                            read.first_token_s = now - begun
                        last = now
                        read.token_ids += fresh
        except httpx.HTTPError as error:
            read.errors.append(repr(error))
        return read

    async def close(self) -> None:
        await self._http.aclose()
