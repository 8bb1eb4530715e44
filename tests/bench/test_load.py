"""The open-loop load, and the combined worker that separate pools are compared with."""

from __future__ import annotations

import asyncio
import time

import httpx

from bench import combined
from bench.client import Answer, Refused
from bench.load import arrivals, offer
from cluster.config import resolve
from cluster.launchers.common import free_port
from penstock.errors import UnavailableError
from tests.cluster.breakage import body_of, fake_answer, prompt_of


def test_arrivals_are_a_poisson_process_of_a_seed() -> None:
    times = arrivals(50.0, 40.0, seed=3)
    assert times == sorted(times) == arrivals(50.0, 40.0, seed=3)
    assert times[0] > 0 and times[-1] < 40.0
    assert abs(len(times) - 2000) < 5 * 2000**0.5
    assert times != arrivals(50.0, 40.0, seed=4)


async def test_each_request_is_counted_once_by_what_became_of_it() -> None:
    async def ask(number: int) -> Answer:
        sent_s = time.monotonic()
        match number % 4:
            case 0:
                return Answer(sent_s, [sent_s + 0.01], sent_s + 0.02)
            case 1:
                raise Refused("no", status=429, retry_after_s=1.0, reason="queue_full", took_s=0.01)
            case 2:
                raise UnavailableError("it broke")
            case _:
                await asyncio.sleep(60)
                raise AssertionError

    out = await offer(ask, [0.001 * n for n in range(20)], 0.2)
    counts = (len(out.answers), len(out.refusals), out.broken, out.unfinished)
    assert counts == (5, 5, 5, 5) and out.sent == 20
    assert len(out.good(ttft_s=1.0)) == 5
    assert out.good(ttft_s=0.001) == []


def test_the_combined_worker_is_a_cluster_with_the_same_answers() -> None:
    flags = {"model.model": "fake", "launcher.kind": "local", "front.port": free_port()}
    prompt = prompt_of(3000, 4)
    with combined.started(resolve(flags, env={}).config) as endpoint:
        answer = httpx.post(
            f"{endpoint.url}/v1/completions", json=body_of(prompt, max_tokens=12), timeout=60
        )
    assert tuple(answer.json()["choices"][0]["token_ids"]) == fake_answer(prompt, 12)
