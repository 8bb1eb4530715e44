"""`penstock bench interference`: what a long prompt does to the answers that are being written.

Some streams decode; then a long prompt is read beside them. Separate pools and one combined worker
are measured in turn, each idle and beside the prompt, several rounds of it.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from typing import Any

from bench import combined
from bench.client import Answer, Client
from bench.prompts import prompt
from bench.report import Report, Row
from bench.stats import finite, percentile, ratio
from cluster.config import ClusterConfig, resolve
from cluster.contracts import Endpoint
from cluster.launch import started
from cluster.launchers.common import free_port

_SHOWS_NOT = (
    "a model: the costs of `fake` are ordered (see settings); they sleep, so pools on one machine "
    "compete only for the cores that the stack itself needs",
    "more than one machine",
)
_SETUPS: tuple[tuple[str, Callable[[ClusterConfig], AbstractContextManager[Endpoint]]], ...] = (
    ("separate pools", started),
    ("one combined worker", combined.started),
)


@dataclass(frozen=True)
class Plan:
    streams: int = 2
    step_ms: float = 100.0
    prefill_tokens_per_s: float = 20_000.0
    chunk_tokens: int = 8192
    long_chars: int = 120_000
    rounds: int = 3
    settle_s: float = 1.0
    seed: int | None = None


@dataclass
class _Gaps:
    """Seconds between two events of a stream, by what was going on."""

    idle: list[float] = field(default_factory=list)
    beside: list[float] = field(default_factory=list)


def run(plan: Plan) -> Report:
    began_s = time.monotonic()
    seed = random.SystemRandom().getrandbits(32) if plan.seed is None else plan.seed
    rows: list[Row] = []
    for name, start in _SETUPS:
        with start(_config(plan)) as endpoint:
            gaps, reading_s = asyncio.run(_measure(plan, endpoint.url, seed))
        rows.append(_row(name, gaps, reading_s))
    return Report(
        bench="interference",
        settings=asdict(plan) | {"seed": seed},
        tables={"time between tokens": rows},
        shows_not=_SHOWS_NOT,
        wall_s=time.monotonic() - began_s,
    )


def _config(plan: Plan) -> ClusterConfig:
    flags: dict[str, Any] = {
        "model.model": "fake",
        "launcher.kind": "local",
        "front.port": free_port(),
        "model.fake_decode_step_ms": plan.step_ms,
        "model.fake_prefill_tokens_per_s": plan.prefill_tokens_per_s,
        "prefill.chunk_tokens": plan.chunk_tokens,
        "front.admission_timeout_s": 600.0,
    }
    return resolve(flags).config


async def _measure(plan: Plan, url: str, seed: int) -> tuple[_Gaps, float]:
    seeds = itertools.count(seed << 20)
    gaps, reading_s = _Gaps(), 0.0
    # As long as reading takes twice over, in steps.
    reads_s = plan.long_chars / plan.prefill_tokens_per_s
    tokens = int((2.5 * reads_s + 3 * plan.settle_s) * 1e3 / plan.step_ms) + 200
    async with Client(url, timeout_s=600.0) as client:

        async def stream(events: list[float]) -> Answer:
            text = prompt(200, seed=next(seeds))
            answer = Answer(0.0)
            answer.event_times_s = events
            return await client.chat(text, max_tokens=tokens, ignore_eos=True, answer=answer)

        await client.chat(prompt(500, seed=next(seeds)), max_tokens=4, ignore_eos=True)
        for _ in range(plan.rounds):
            events: list[list[float]] = [[] for _ in range(plan.streams)]
            streams = [asyncio.create_task(stream(each)) for each in events]
            await asyncio.sleep(plan.settle_s)
            idle_s = time.monotonic()
            await asyncio.sleep(reads_s)
            begun_s = time.monotonic()
            text = prompt(plan.long_chars, seed=next(seeds))
            sent_s = time.monotonic()
            await client.chat(text, max_tokens=1, ignore_eos=True)
            ended_s = time.monotonic()
            for task in streams:
                task.cancel()
            await asyncio.gather(*streams, return_exceptions=True)
            reading_s += ended_s - sent_s
            for times in events:
                for before, after in itertools.pairwise(times):
                    if idle_s <= before and after <= begun_s:
                        gaps.idle.append(after - before)
                    elif sent_s <= after and before <= ended_s:
                        gaps.beside.append(after - before)
    return gaps, reading_s / plan.rounds


def _row(name: str, gaps: _Gaps, reading_s: float) -> Row:
    row: dict[str, Any] = {"workers": name, "prompt_read_in_s": finite(reading_s)}
    for what in ("idle", "beside"):
        values = getattr(gaps, what)
        row[f"{what}_n"] = len(values)
        for q in (50, 99):
            row[f"{what}_ms_p{q}"] = finite(percentile(values, q) * 1e3)
    row["p50_ratio"] = ratio(row["beside_ms_p50"], row["idle_ms_p50"])
    row["p99_ratio"] = ratio(row["beside_ms_p99"], row["idle_ms_p99"])
    return row
