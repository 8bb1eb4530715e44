"""`penstock bench serve`: what a client of the HTTP endpoint sees under a few concurrencies."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from bench.client import Answer, Client
from bench.drafts import acceptance, read_counts
from bench.prompts import prompt
from bench.report import Report, Row
from bench.stats import finite, median, ratio, spread
from cluster.config import ClusterConfig
from penstock.errors import PenstockError

_SHOWS_NOT = (
    "other prompt lengths, other models, or more than one machine",
    "the server alone: client and server share the machine's cores unless --url names another one",
    "tails: a percentile of n values says nothing beyond 1 - 1/n",
)
_OWN_SHOWS_NOT = "a model: the latencies of `fake` are ordered (see settings)"


@dataclass(frozen=True)
class ServePlan:
    """What is sent. Every figure's n follows from it or stands beside it."""

    concurrencies: tuple[int, ...] = (1, 4, 16)
    seconds: float = 8.0
    """For each concurrency; requests that run then are finished and counted."""
    prompt_chars: int = 2_000
    max_tokens: int = 64
    cached_prompt_chars: int = 16_000
    cached_pairs: int = 5
    ignore_eos: bool = True
    """An extension that vLLM and SGLang know as well; not every server does."""
    seed: int | None = None
    """None: a fresh one, so that no cache of an earlier run helps."""


def run(
    plan: ServePlan, *, config: ClusterConfig | None, url: str | None, model: str, key: str | None
) -> Report:
    """Measures `url`, or a cluster of `config` that it starts and stops. Exactly one is given."""
    began_s = time.monotonic()
    seed = random.SystemRandom().getrandbits(32) if plan.seed is None else plan.seed
    with _server(config, url) as (base, startup_s):
        counted = read_counts(base)
        loads, pairs = asyncio.run(_measure(plan, seed, base, model, key))
        drafts = acceptance(counted, read_counts(base, settle=True))
    settings = asdict(plan) | {
        "seed": seed,
        "server": "given by --url" if config is None else config.launcher.kind,
        "model": model if config is None else config.model.model,
        "startup_s": startup_s,
    }
    if config is not None and config.model.model == "fake":
        settings["fake_decode_step_ms"] = config.model.fake_decode_step_ms
        settings["fake_prefill_tokens_per_s"] = config.model.fake_prefill_tokens_per_s
    edges = _SHOWS_NOT if config is None else (*_SHOWS_NOT, _OWN_SHOWS_NOT)
    return Report(
        bench="serve",
        settings=settings,
        tables={"load": loads, "prompt seen before": pairs}
        | ({"drafts": drafts} if drafts else {}),
        shows_not=edges,
        wall_s=time.monotonic() - began_s,
    )


@contextlib.contextmanager
def _server(config: ClusterConfig | None, url: str | None) -> Iterator[tuple[str, float | None]]:
    if config is None:
        yield url or "", None
        return
    from cluster.launch import started

    began_s = time.monotonic()
    with started(config) as endpoint:
        yield endpoint.url, time.monotonic() - began_s


async def _measure(
    plan: ServePlan, seed: int, url: str, model: str, key: str | None
) -> tuple[list[Row], list[Row]]:
    seeds = itertools.count(seed << 20)
    async with Client(url, model=model, api_key=key) as client:
        # Connections, lazy imports and caches of code are not what is measured.
        await _one(client, plan, prompt(plan.prompt_chars, seed=next(seeds)))
        loads: list[Row] = [
            await _load(client, plan, streams, seeds) for streams in plan.concurrencies
        ]
        return loads, [await _cached(client, plan, seeds)]


async def _one(
    client: Client, plan: ServePlan, text: str, *, max_tokens: int | None = None
) -> Answer:
    extra: dict[str, Any] = {"ignore_eos": True} if plan.ignore_eos else {}
    return await client.chat(text, max_tokens=max_tokens or plan.max_tokens, **extra)


async def _load(client: Client, plan: ServePlan, streams: int, seeds: itertools.count[int]) -> Row:
    """`streams` clients, each of which asks again as soon as it has its answer."""
    answers: list[Answer] = []
    failures = 0
    began_s = time.monotonic()

    async def ask_again() -> None:
        nonlocal failures
        while time.monotonic() < began_s + plan.seconds:
            try:
                answers.append(
                    await _one(client, plan, prompt(plan.prompt_chars, seed=next(seeds)))
                )
            except PenstockError:
                failures += 1
                if failures > 3 * streams:
                    raise

    await asyncio.gather(*(ask_again() for _ in range(streams)))
    return load_row(streams, answers, failures, time.monotonic() - began_s)


def load_row(streams: int, answers: list[Answer], failures: int, took_s: float) -> Row:
    """One concurrency's figures. Pure."""
    tokens = sum(a.completion_tokens for a in answers)
    events = sum(len(a.event_times_s) for a in answers)
    return {
        "streams": streams,
        "n_requests": len(answers),
        "failed": failures,
        **spread([a.ttft_s for a in answers], "ttft_ms", scale=1e3),
        **spread([gap for a in answers for gap in a.event_gaps_s], "gap_ms", scale=1e3),
        "tokens_per_s": finite(tokens / took_s),
        "requests_per_s": finite(len(answers) / took_s),
        "tokens_per_event": ratio(tokens, events),
        "prompt_tokens": int(median([a.prompt_tokens for a in answers])) if answers else None,
    }


async def _cached(client: Client, plan: ServePlan, seeds: itertools.count[int]) -> Row:
    """Each of n prompts twice in a row, one stream: time to the first token, fresh and again."""
    fresh, again = [], []
    for _ in range(plan.cached_pairs):
        text = prompt(plan.cached_prompt_chars, seed=next(seeds))
        fresh.append(await _one(client, plan, text, max_tokens=4))
        again.append(await _one(client, plan, text, max_tokens=4))
    fresh_s, again_s = (median([a.ttft_s for a in each]) for each in (fresh, again))
    return {
        "n_pairs": plan.cached_pairs,
        "prompt_tokens": int(median([a.prompt_tokens for a in fresh])),
        "cached_tokens_fresh": int(median([a.cached_tokens for a in fresh])),
        "cached_tokens_again": int(median([a.cached_tokens for a in again])),
        "ttft_fresh_ms": finite(fresh_s * 1e3),
        "ttft_again_ms": finite(again_s * 1e3),
        "ratio": ratio(again_s, fresh_s),
    }
