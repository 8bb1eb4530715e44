"""`penstock bench overload`: three times what a cluster can do, with admission and without.

Capacity is measured first, on the same cluster: as many clients as it has places, each of which
asks again as soon as it has its answer. Then requests come at a multiple of that rate whatever
becomes of them. Good is an answer that was whole in time and whose first token came as promised.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import time
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass, field
from typing import Any

import httpx

from bench.client import Answer, Client
from bench.load import Outcomes, arrivals, offer
from bench.prompts import prompt
from bench.report import Report, Row
from bench.stats import finite, percentile, ratio, spread
from cluster.config import ClusterConfig, resolve
from cluster.launch import started
from cluster.launchers.common import free_port

_LOOK_S = 0.2
_SHOWS_NOT = (
    "a model: the latencies of `fake` are ordered (see settings)",
    "more than one machine; client and server share the cores",
    "a client that tries again after a refusal: every request comes once",
)


@dataclass(frozen=True)
class Plan:
    """What is offered, and to what."""

    factor: float = 3.0
    seconds: float = 20.0
    places: int = 8
    """Requests that decode works on at once."""
    step_ms: float = 100.0
    max_tokens: int = 10
    prompt_chars: int = 600
    promise_s: float = 3.0
    """Time to the first token of a good answer."""
    wait_s: float = 1.5
    """With admission: the longest line that a request is let into."""
    most_queued: int = 64
    prefill_tokens_per_s: float = 20_000.0
    seed: int | None = None


def run(plan: Plan) -> Report:
    began_s = time.monotonic()
    seed = random.SystemRandom().getrandbits(32) if plan.seed is None else plan.seed
    rows: list[Row] = []
    capacity: float | None = None
    for admission in (True, False):
        with started(_config(plan, admission=admission)) as endpoint:
            found = asyncio.run(_measure(plan, endpoint.url, seed, capacity))
        capacity = found.capacity_per_s
        rows.append(_row(plan, "on" if admission else "off", found))
    return Report(
        bench="overload",
        settings=asdict(plan) | {"seed": seed},
        tables={"admission": rows},
        shows_not=_SHOWS_NOT,
        wall_s=time.monotonic() - began_s,
    )


@dataclass
class _Found:
    capacity_per_s: float
    outcomes: Outcomes
    queued: dict[str, int] = field(default_factory=dict)
    """By role, the longest line that was seen."""


def _config(plan: Plan, *, admission: bool) -> ClusterConfig:
    """Without admission: the same cluster with every bound out of reach."""
    flags: dict[str, Any] = {
        "model.model": "fake",
        "launcher.kind": "local",
        "front.port": free_port(),
        "model.fake_decode_step_ms": plan.step_ms,
        "model.fake_prefill_tokens_per_s": plan.prefill_tokens_per_s,
        "decode.max_running": plan.places,
        "decode.max_queued": plan.most_queued if admission else 1_000_000,
        "prefill.max_queued": plan.most_queued if admission else 1_000_000,
        "front.admission_timeout_s": plan.wait_s if admission else 3600.0,
        "front.max_prefill_wait_s": plan.wait_s if admission else 3600.0,
        "front.max_streams": 100_000,
    }
    return resolve(flags).config


async def _measure(plan: Plan, url: str, seed: int, capacity: float | None) -> _Found:
    """`capacity`: as measured before, so that both loads are the same."""
    seeds = itertools.count(seed << 20)

    async def ask(number: int) -> Answer:
        text = prompt(plan.prompt_chars, seed=next(seeds))
        return await client.chat(text, max_tokens=plan.max_tokens, ignore_eos=True)

    async with Client(url, timeout_s=600.0) as client:
        await ask(0)
        able = await _capacity(plan, ask)
        rate = plan.factor * (able if capacity is None else capacity)
        queued: dict[str, int] = {}
        async with _watching(url, queued):
            times = arrivals(rate, plan.seconds, seed=seed)
            outcomes = await offer(ask, times, plan.seconds)
    return _Found(able if capacity is None else capacity, outcomes, queued)


async def _capacity(plan: Plan, ask: Any) -> float:
    """Answers a second of a cluster that is busy and not more than that."""
    until_s = time.monotonic() + max(4.0, plan.seconds / 3)
    ended: list[float] = []

    async def again() -> None:
        while time.monotonic() < until_s:
            await ask(0)
            ended.append(time.monotonic())

    await asyncio.gather(*(again() for _ in range(plan.places)))
    # The first and the last round are not a steady state.
    first, last = sorted(ended)[plan.places - 1], sorted(ended)[-plan.places]
    return sum(first < at <= last for at in ended) / (last - first)


@contextlib.asynccontextmanager
async def _watching(url: str, queued: dict[str, int]) -> AsyncIterator[None]:
    """Reads the cluster's own view, and keeps the longest line of each role."""

    async def look() -> None:
        async with httpx.AsyncClient(base_url=url, timeout=5.0, trust_env=False) as http:
            while True:
                await asyncio.sleep(_LOOK_S)
                with contextlib.suppress(httpx.HTTPError, ValueError):
                    for worker in (await http.get("/cluster")).json()["workers"]:
                        role = worker["role"]
                        queued[role] = max(queued.get(role, 0), worker["queued"])

    looking = asyncio.create_task(look())
    try:
        yield
    finally:
        looking.cancel()
        await asyncio.gather(looking, return_exceptions=True)


def _row(plan: Plan, admission: str, found: _Found) -> Row:
    outcomes = found.outcomes
    good = len(outcomes.good(ttft_s=plan.promise_s)) / plan.seconds
    took_ms = [refusal.took_s * 1e3 for refusal in outcomes.refusals]
    reasons = sorted({refusal.why for refusal in outcomes.refusals})
    return {
        "admission": admission,
        "capacity_per_s": finite(found.capacity_per_s),
        "offered_per_s": finite(outcomes.sent / plan.seconds),
        "sent": outcomes.sent,
        "goodput_per_s": finite(good),
        "goodput_of_capacity": ratio(good, found.capacity_per_s),
        "answered": len(outcomes.answers),
        "refused": len(outcomes.refusals),
        "broken": outcomes.broken,
        "unfinished": outcomes.unfinished,
        **spread([a.ttft_s for a in outcomes.answers], "ttft_s"),
        "refusal_ms_p50": finite(percentile(took_ms, 50)),
        "refusal_ms_p99": finite(percentile(took_ms, 99)),
        "refusal_ms_most": max(took_ms, default=None),
        "refusals_over_100_ms": sum(ms > 100 for ms in took_ms),
        "without_retry_after": sum(r.after_s is None for r in outcomes.refusals),
        "reasons": ", ".join(reasons) or None,
        "most_queued_decode": found.queued.get("decode"),
        "most_queued_prefill": found.queued.get("prefill"),
        "bound_of_a_queue": plan.most_queued if admission == "on" else None,
    }
