"""`penstock bench fairness`: a short prompt beside million-token ones, and two tenants of unlike
load.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from dataclasses import asdict, dataclass
from typing import Any

import httpx

from bench.client import Client, Refused
from bench.prompts import prompt
from bench.report import Report, Row
from bench.stats import finite, median, percentile, ratio
from cluster.config import ClusterConfig, resolve
from cluster.launch import started
from cluster.launchers.common import free_port
from penstock.errors import PenstockError
from penstock.telemetry import catalog as M

_KEYS = ("bench-tenant-with-much-load", "bench-tenant-with-little-load")
_SHOWS_NOT = (
    "a model: the latencies of `fake` are ordered (see settings)",
    "more than one machine, or more than one prefill worker",
)


@dataclass(frozen=True)
class Plan:
    long_chars: int = 1_000_000
    long_streams: int = 3
    short_chars: int = 1_000
    shorts: int = 12
    prefill_tokens_per_s: float = 20_000.0
    chunk_tokens: int = 8_192
    tenant_chars: int = 24_000
    tenant_streams: tuple[int, int] = (10, 1)
    """Requests that each tenant always has under way; the smaller one sends its own in twos so that
    it is backlogged too."""
    tenant_seconds: float = 20.0
    seed: int | None = None

    @property
    def chunk_s(self) -> float:
        return self.chunk_tokens / self.prefill_tokens_per_s


def run(plan: Plan) -> Report:
    began_s = time.monotonic()
    seed = random.SystemRandom().getrandbits(32) if plan.seed is None else plan.seed
    with started(_config(plan)) as endpoint:
        short = asyncio.run(_short(plan, endpoint.url, seed))
        tenants = asyncio.run(_tenants(plan, endpoint.url, seed + 1))
    return Report(
        bench="fairness",
        settings=asdict(plan) | {"seed": seed, "chunk_ms": plan.chunk_s * 1e3},
        tables={"a short prompt": [short], "two tenants": tenants},
        shows_not=_SHOWS_NOT,
        wall_s=time.monotonic() - began_s,
    )


def _config(plan: Plan) -> ClusterConfig:
    flags: dict[str, Any] = {
        "model.model": "fake",
        "launcher.kind": "local",
        "front.port": free_port(),
        "front.api_key": ",".join(_KEYS),
        "model.fake_prefill_tokens_per_s": plan.prefill_tokens_per_s,
        "prefill.chunk_tokens": plan.chunk_tokens,
        "decode.max_running": 64,
        "front.admission_timeout_s": 600.0,
        "front.max_prefill_wait_s": 3600.0,
    }
    return resolve(flags).config


async def _short(plan: Plan, url: str, seed: int) -> Row:
    """Times to the first token of short prompts, alone and beside a stream of long ones."""
    seeds = itertools.count(seed << 20)
    async with Client(url, api_key=_KEYS[0], timeout_s=600.0) as client:

        async def ttft_s() -> float:
            text = prompt(plan.short_chars, seed=next(seeds))
            return (await client.chat(text, max_tokens=1, ignore_eos=True)).ttft_s

        async def stream() -> None:
            while True:
                text = prompt(plan.long_chars, seed=next(seeds))
                await client.chat(text, max_tokens=1, ignore_eos=True)

        await ttft_s()
        alone = [await ttft_s() for _ in range(plan.shorts)]
        streams = [asyncio.create_task(stream()) for _ in range(plan.long_streams)]
        try:
            # Until they are being read; encoding a million characters takes a while.
            await asyncio.sleep(8 + 2 * plan.long_streams)
            if any(task.done() for task in streams):
                raise PenstockError("the long prompts ended before they were measured beside")
            beside = []
            before = await _chunks(url)
            for _ in range(plan.shorts):
                beside.append(await ttft_s())
                await asyncio.sleep(0.37 * plan.chunk_s)
            after = await _chunks(url)
        finally:
            for task in streams:
                task.cancel()
            await asyncio.gather(*streams, return_exceptions=True)
    own_s = median(alone)
    # As it was on this machine in this minute, not as it was ordered.
    chunk_s = (after[0] - before[0]) / max(1.0, after[1] - before[1])
    return {
        "prompt_chars": plan.short_chars,
        "n": plan.shorts,
        "chunk_ms_ordered": plan.chunk_s * 1e3,
        "chunk_ms": finite(chunk_s * 1e3),
        "alone_ms_p50": finite(own_s * 1e3),
        "beside_ms_p50": finite(median(beside) * 1e3),
        "beside_ms_most": finite(max(beside) * 1e3),
        "chunks_more_p50": ratio(median(beside) - own_s, chunk_s),
        "chunks_more_most": ratio(max(beside) - own_s, chunk_s),
        "allowed": 2,
    }


async def _chunks(url: str) -> tuple[float, float]:
    """Seconds and number of all steps of prefill so far, as the cluster counts them."""
    async with httpx.AsyncClient(base_url=url, timeout=10.0, trust_env=False) as http:
        lines = (await http.get("/metrics")).text.splitlines()

    def total(end: str) -> float:
        name = f"penstock_{M.CHUNK_TIME.name}_{end}"
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))

    return total("sum"), total("count")


async def _tenants(plan: Plan, url: str, seed: int) -> list[Row]:
    """Tokens read for each tenant while both always have more to read."""
    seeds = itertools.count(seed << 20)
    read = [0, 0]
    waits: list[list[float]] = [[], []]
    measuring = False

    async def again(tenant: int, client: Client) -> None:
        while True:
            text = prompt(plan.tenant_chars, seed=next(seeds))
            try:
                answer = await client.chat(text, max_tokens=1, ignore_eos=True)
            except Refused:
                await asyncio.sleep(0.1)
                continue
            if measuring:
                read[tenant] += answer.prompt_tokens
                waits[tenant].append(answer.ttft_s)

    async with Client(url, api_key=_KEYS[0]) as much, Client(url, api_key=_KEYS[1]) as little:
        # Two for the smaller one: while an answer travels the next prompt is there.
        counts = plan.tenant_streams[0] * 2, plan.tenant_streams[1] * 2
        tasks = [
            asyncio.create_task(again(tenant, client))
            for tenant, client in enumerate((much, little))
            for _ in range(counts[tenant])
        ]
        await asyncio.sleep(3.0)
        measuring = True
        await asyncio.sleep(plan.tenant_seconds)
        measuring = False
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    total = sum(read)
    return [
        {
            "tenant": name,
            "requests_under_way": counts[tenant],
            "answers": len(waits[tenant]),
            "tokens_read": read[tenant],
            "share": ratio(read[tenant], total),
            "ttft_s_p50": finite(percentile(waits[tenant], 50)),
        }
        for tenant, name in enumerate(("much load", "little load"))
    ]
