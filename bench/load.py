"""An open-loop load: requests come when they come, whatever became of those before."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from bench.client import Answer, Refused
from penstock.errors import PenstockError


@dataclass
class Outcomes:
    """What became of the requests of one load. Times are seconds of the monotonic clock."""

    began_s: float
    seconds: float
    sent: int = 0
    answers: list[Answer] = field(default_factory=list)
    refusals: list[Refused] = field(default_factory=list)
    broken: int = 0
    unfinished: int = 0
    """Still waiting for their answer when the load ended; they were hung up on."""

    def good(self, *, ttft_s: float) -> list[Answer]:
        """Answers that were whole within the load's time and began within `ttft_s`."""
        end_s = self.began_s + self.seconds
        return [a for a in self.answers if a.ttft_s <= ttft_s and a.ended_s <= end_s]


def arrivals(rate_per_s: float, seconds: float, *, seed: int) -> list[float]:
    """Times of a Poisson process in [0, seconds)."""
    rng = random.Random(seed)
    times, at = [], rng.expovariate(rate_per_s)
    while at < seconds:
        times.append(at)
        at += rng.expovariate(rate_per_s)
    return times


async def offer(
    ask: Callable[[int], Awaitable[Answer]], times: list[float], seconds: float
) -> Outcomes:
    """`ask(number)` at each of `times`; what has not ended after `seconds` is cancelled."""
    out = Outcomes(time.monotonic(), seconds)

    async def one(number: int) -> None:
        try:
            out.answers.append(await ask(number))
        except Refused as refusal:
            out.refusals.append(refusal)
        except PenstockError:
            out.broken += 1

    tasks = []
    for number, at in enumerate(times):
        await asyncio.sleep(max(0.0, out.began_s + at - time.monotonic()))
        out.sent += 1
        tasks.append(asyncio.create_task(one(number)))
    await asyncio.sleep(max(0.0, out.began_s + seconds - time.monotonic()))
    left = [task for task in tasks if not task.done()]
    out.unfinished = len(left)
    for task in left:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return out
