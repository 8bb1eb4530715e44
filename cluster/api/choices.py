"""The choices of one response: what runs for each, and all of them side by side.

A prompt with several choices is read once: its first choice goes ahead, the others start when its
prompt is in the store and find it there.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, cast

from cluster.api.evidence import EvidenceText
from cluster.api.grounding import Grounding
from cluster.api.logprobs import Logprobs
from cluster.api.parts import AnswerParts
from cluster.api.records import TokenRecord
from cluster.contracts import Service
from penstock.request import Event, Finish, Progress, Request, TokenChunk, Usage

_AT_ONCE = 8
"""Of one response: a client that asks for many choices must not fill the decode workers' queues
and then fail there for its own sake."""
_QUEUE_EVENTS = 256


@dataclass(frozen=True, eq=False)
class Choice:
    """One answer to one prompt."""

    index: int
    request: Request
    leads: bool = True
    """First of its prompt: its prompt tokens are the ones that count."""
    evidence: EvidenceText | None = None
    grounding: Grounding | None = None
    """The answer is held back until it is checked."""
    tokens: TokenRecord | None = None
    parts: AnswerParts | None = None
    """None: the text is the content."""
    logprobs: Logprobs | None = None
    echo: str = ""
    """The prompt's text, if the answer is to begin with it."""

    def told(self, evidence: str) -> dict[str, Any]:
        """Extension fields known only at the end; `evidence` names that of the whole answer."""
        told: dict[str, Any] = {}
        if self.evidence is not None:
            told[evidence] = self.evidence.of_answer()
        if self.grounding is not None:
            told["grounding"] = self.grounding.told
        return told


class Total:
    """Usage of a response: every prompt once, every answer."""

    def __init__(self) -> None:
        self.reasoning_tokens: int | None = None
        self.reason = "stop"
        self.timings: dict[str, float] = {}
        self._prompt = self._cached = self._completion = 0
        self._unknown_reasoning = False

    def add(self, choice: Choice, finish: Finish) -> None:
        usage = finish.usage
        if choice.leads:
            self._prompt += usage.prompt_tokens
            self._cached += min(usage.cached_tokens, usage.prompt_tokens)
            self.timings = self.timings or dict(finish.timings)
        self._completion += usage.completion_tokens
        if finish.reason != "stop":
            self.reason = finish.reason
        if choice.parts is not None:
            reasoning = choice.parts.reasoning_tokens(finish)
            self._unknown_reasoning |= reasoning is None
            self.reasoning_tokens = (self.reasoning_tokens or 0) + (reasoning or 0)
            if self._unknown_reasoning:
                self.reasoning_tokens = None

    @property
    def usage(self) -> Usage:
        return Usage(self._prompt, self._cached, self._completion)


async def run(service: Service, choices: Sequence[Choice]) -> AsyncIterator[tuple[Choice, Event]]:
    """Events of all choices, each choice's in order. The first error ends all of them, and so does
    closing.
    """
    if len(choices) == 1:
        async with aclosing(_events(service, choices[0])) as events:
            async for event in events:
                yield choices[0], event
        return
    queue: asyncio.Queue[tuple[Choice, Event] | Exception] = asyncio.Queue(_QUEUE_EVENTS)
    places = asyncio.Semaphore(_AT_ONCE)
    read: dict[int, asyncio.Event] = {}
    running = {choice.index for choice in choices}

    async def one(choice: Choice, prompt_read: asyncio.Event) -> None:
        try:
            if not choice.leads:
                await prompt_read.wait()
            async with places, aclosing(_events(service, choice)) as events:
                async for event in events:
                    if choice.leads and _has_read(event):
                        prompt_read.set()
                    await queue.put((choice, event))
                    if isinstance(event, Finish):
                        running.discard(choice.index)
        except Exception as error:
            # Raised where the events are read.
            await queue.put(error)

    lead = 0
    tasks = []
    for choice in choices:
        lead = choice.index if choice.leads else lead
        tasks.append(asyncio.create_task(one(choice, read.setdefault(lead, asyncio.Event()))))
    try:
        left = len(choices)
        while left:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            yield item
            left -= isinstance(item[1], Finish)
    finally:
        for choice, task in zip(choices, tasks, strict=True):
            # One that has ended is giving back what it held and must not be disturbed.
            if choice.index in running:
                task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _events(service: Service, choice: Choice) -> Any:
    """Every `generate` is an async generator; the contract promises an iterator with aclose."""
    events = service.generate(choice.request)
    if choice.grounding is not None:
        events = choice.grounding.events(events)
    return cast(Any, events)


def _has_read(event: Event) -> bool:
    if isinstance(event, Progress):
        return event.tokens_done >= event.tokens_total
    return isinstance(event, TokenChunk | Finish)
