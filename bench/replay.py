"""A trace of requests sent to a running server at its own times: what each of them saw."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bench.client import Answer, Client
from cluster.simulate.trace import SimRequest, Trace
from penstock.errors import PenstockError, UsageError

_LATE_S = 0.25
"""A client that is so late at the worst has measured itself."""


@dataclass(frozen=True)
class Seen:
    """One request as its client saw it."""

    request: SimRequest
    answer: Answer
    late_s: float
    """Sent so much after its time."""


def prompt_tokens(request: SimRequest, block_tokens: int) -> list[int]:
    """Token ids that are equal for equal block ids and for nothing else: lower-case letters, which
    every byte-level vocabulary has at these ids.
    """
    tokens: list[int] = []
    for id_ in request.blocks:
        tokens += _letters(id_, block_tokens)
    tail = f"tail {request.number}".encode() + (request.blocks[-1] if request.blocks else b"")
    return tokens + _letters(tail, request.prompt_tokens - len(tokens))


def _letters(seed: bytes, count: int) -> list[int]:
    return [97 + byte % 26 for byte in hashlib.shake_128(seed).digest(count)]


async def replay(trace: Trace, client: Client, **fields: Any) -> list[Seen]:
    """Every request at its time, whatever the server does. Raises the first refusal.

    `fields` go into each body.
    """
    prompts = [prompt_tokens(request, trace.block_tokens) for request in trace.requests]
    began_s = time.monotonic() + 0.5

    async def one(request: SimRequest, tokens: list[int]) -> Seen:
        await asyncio.sleep(max(0.0, began_s + request.arrival_s - time.monotonic()))
        answer = await client.complete(
            tokens, max_tokens=request.output_tokens, ignore_eos=True, **fields
        )
        return Seen(request, answer, answer.sent_s - began_s - request.arrival_s)

    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(one(request, tokens))
            for request, tokens in zip(trace.requests, prompts, strict=True)
        ]
    seen = [task.result() for task in tasks]
    worst_s = max(each.late_s for each in seen)
    if worst_s > _LATE_S:
        raise PenstockError(
            f"a request was sent {worst_s:.2f} s after its time: this machine is too busy to be "
            "measured against; try again, or a trace with fewer requests a second"
        )
    return seen


def check_lengths(seen: Sequence[Seen]) -> None:
    """Raises UsageError if the server read other prompts than were meant."""
    for each in seen:
        if each.answer.prompt_tokens != each.request.prompt_tokens:
            raise UsageError(
                f"the server counted {each.answer.prompt_tokens} prompt tokens where "
                f"{each.request.prompt_tokens} were sent; --against needs /v1/completions with "
                "token ids"
            )
