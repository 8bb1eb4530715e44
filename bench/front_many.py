"""`penstock bench front --at-once N`: N streams of the fake model opened in one moment, launcher
`local`. Are all of them whole, what memory does the front take, how late is a token?
"""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass

import httpx

from bench.client import Answer, Client
from bench.procs import Process, all_processes, cpu_by, descendants, part_of
from bench.prompts import prompt
from bench.report import Report, Row
from bench.stats import finite, gaps, spread
from penstock.errors import PenstockError

_LOOK_S = 0.25
_PROMPT_CHARS = 64
_SHOWS_NOT = (
    "with `late`, the front alone: it is all that stands between a worker's pace and the client's "
    "clock, and client and workers share these cores; `front held` is the front's own clock, from "
    "reading an event off the worker's stream to handing it to the connection, and misses how long "
    "an event lay unread; `steady`: from the moment at which every stream had begun",
    "memory between two looks, a quarter of a second apart",
)


@dataclass(frozen=True)
class Many:
    """One round. Bytes are resident memory of the front processes together."""

    answers: list[Answer]
    failures: list[str]
    wall_s: float
    before_bytes: int
    most_bytes: int
    front_cpu_s: float
    held: dict[float, int]
    """Streamed events by the time that the front held them: counts by upper border in seconds."""
    held_steady: dict[float, int]
    """The same, from the moment at which every stream had begun; empty if that never came."""


def run(*, streams: int, tokens: int, step_ms: float, workers: int) -> Report:
    """`workers` decode workers share the streams: a worker draws for all of its own at once."""
    from cluster.config import resolve
    from cluster.launch import started
    from cluster.launchers.common import free_port

    began_s = time.monotonic()
    flags = {
        "model.model": "fake",
        "model.fake_decode_step_ms": step_ms,
        "launcher.kind": "local",
        "front.port": free_port(),
        "front.max_streams": streams + 8,
        "prefill.max_queued": streams + 8,
        "decode.replicas": workers,
        "decode.max_running": -(-streams // workers) + 8,
    }
    with started(resolve(flags).config) as endpoint:
        many = asyncio.run(_measured(endpoint.url, streams, tokens))
    return Report(
        bench="front at once",
        settings={
            "streams": streams,
            "tokens_a_stream": tokens,
            "fake_decode_step_ms": step_ms,
            "decode_workers": workers,
        },
        tables={f"{streams} streams at once": [row(many, step_ms)]},
        shows_not=(*_SHOWS_NOT, *(f"failed: {words}" for words in many.failures[:3])),
        wall_s=time.monotonic() - began_s,
    )


def row(many: Many, step_ms: float) -> Row:
    """Pure. A gap is between two events with text; a token is late by what exceeds the pace."""
    tokens = sum(a.completion_tokens for a in many.answers)
    late = [max(0.0, g - step_ms / 1e3) for a in many.answers for g in gaps(a.event_times_s)]
    return {
        "way": "uvicorn (local)",
        "n": 1,
        "whole": len(many.answers),
        "dropped": len(many.failures),
        "wall_s": many.wall_s,
        "tokens_per_s": finite(tokens / many.wall_s),
        "front_before_mb": many.before_bytes / 1e6,
        "front_most_mb": many.most_bytes / 1e6,
        **_held(many.held, "front_held"),
        **_held(many.held_steady, "front_held_steady"),
        "front_cpu_ms_a_token": finite(many.front_cpu_s * 1e3 / tokens) if tokens else None,
        **spread(late, "late_ms", scale=1e3),
        **spread([a.ttft_s for a in many.answers], "ttft_ms", scale=1e3),
    }


async def _measured(url: str, streams: int, tokens: int) -> Many:
    async with Client(url, model="fake") as client:
        await client.chat(prompt(_PROMPT_CHARS, seed=streams), max_tokens=8, ignore_eos=True)
        held = await asyncio.to_thread(_held_so_far, url)
        before_bytes, cpu_s = _front_bytes(), cpu_by(part_of).get("front", 0.0)
        began_s = time.monotonic()
        most = asyncio.create_task(_most_bytes())
        all_begun = _Countdown(streams)
        ramp = asyncio.create_task(_held_once(url, all_begun))
        try:
            ended = await asyncio.gather(
                *(_whole(client, seed, tokens, all_begun.one) for seed in range(streams)),
                return_exceptions=True,
            )
            wall_s = time.monotonic() - began_s
        finally:
            most.cancel()
            ramp.cancel()
            peak, ramped = await asyncio.gather(most, ramp)
        cpu_s = cpu_by(part_of).get("front", 0.0) - cpu_s
    now = await asyncio.to_thread(_held_so_far, url)
    held = _less(now, held)
    steady = {} if ramped is None else _less(now, ramped)
    failures = []
    for each in ended:
        if isinstance(each, PenstockError):
            failures.append(each.message)
        elif isinstance(each, BaseException):
            raise each
    answers = [each for each in ended if isinstance(each, Answer)]
    most_bytes = max(peak, before_bytes)
    return Many(answers, failures, wall_s, before_bytes, most_bytes, cpu_s, held, steady)


class _Countdown:
    """`done` is set when `one` has been called `count` times."""

    def __init__(self, count: int) -> None:
        self._left = count
        self.done = asyncio.Event()

    def one(self) -> None:
        self._left -= 1
        if self._left <= 0:
            self.done.set()


async def _held_once(url: str, begun: _Countdown) -> dict[float, int] | None:
    """What the front held up to the moment at which all had begun; None if cancelled before."""
    try:
        await begun.done.wait()
        return await asyncio.to_thread(_held_so_far, url)
    except asyncio.CancelledError:
        return None


def _less(now: dict[float, int], before: dict[float, int]) -> dict[float, int]:
    return {border: count - before.get(border, 0) for border, count in now.items()}


def _held_so_far(url: str) -> dict[float, int]:
    """The front's own histogram, cumulative as it tells it."""
    text = httpx.get(f"{url}/metrics?scope=front", timeout=30, trust_env=False).text
    found = re.findall(r'^penstock_front_token_seconds_bucket\{le="([^"]+)"\} (\S+)', text, re.M)
    return {float(border): int(float(count)) for border, count in found}


def _held(counts: dict[float, int], what: str) -> Row:
    """Pure. Upper borders of the buckets that hold the quantiles; null if nothing was counted."""
    total = max(counts.values(), default=0)
    row: dict[str, float | None] = {f"{what}_n": total}
    for name, share in (("p50", 0.5), ("p99", 0.99)):
        within = [border for border, count in sorted(counts.items()) if count >= share * total]
        row[f"{what}_ms_{name}_at_most"] = finite(within[0] * 1e3) if total else None
    return row


async def _whole(client: Client, seed: int, tokens: int, begun: Callable[[], None]) -> Answer:
    """Raises PenstockError also for an answer that is shorter than was asked for."""
    answer = await client.chat(
        prompt(_PROMPT_CHARS, seed=seed), max_tokens=tokens, begun=begun, ignore_eos=True
    )
    if answer.completion_tokens != tokens:
        raise PenstockError(f"an answer ended after {answer.completion_tokens} of {tokens} tokens")
    return answer


async def _most_bytes() -> int:
    """Until it is cancelled."""
    most = 0
    try:
        while True:
            most = max(most, await asyncio.to_thread(_front_bytes))
            await asyncio.sleep(_LOOK_S)
    except asyncio.CancelledError:
        return max(most, _front_bytes())


def _front_bytes() -> int:
    below: list[Process] = descendants(all_processes(), os.getpid())
    return sum(p.resident_bytes for p in below if part_of(p.command) == "front")
