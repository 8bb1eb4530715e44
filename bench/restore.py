"""A prompt's prefix from the store beside computing it, through a local cluster.

A prompt that nobody has seen, then the same one with more behind it. What the prefill worker says
of itself is compared (time in the model for the first, look-up to attached for the second), and
what a client sees: the wait for the first token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import httpx

from bench.client import Client
from bench.prompts import prompt
from bench.report import Row
from bench.stats import finite, low_median_high, median, ratio
from penstock.errors import PenstockError
from penstock.telemetry import catalog as M
from penstock.telemetry.metric import PREFIX, Metric

TOKENS = 65_536
_MORE = " And one thing more: what was the last word before this?"


@dataclass(frozen=True)
class Pair:
    """One prompt computed and its prefix restored; seconds."""

    prompt_tokens: int
    cached_tokens: int
    compute_s: float
    restore_s: float
    cold_ttft_s: float
    warm_ttft_s: float

    @property
    def times_faster(self) -> float:
        """The restored tokens' share of the computing, by the restoring."""
        return self.compute_s * self.cached_tokens / self.prompt_tokens / self.restore_s


async def measure(client: Client, *, chars: int, repeats: int, seed: int) -> Row:
    pairs = []
    for number in range(repeats):
        text = prompt(chars, seed=seed + number)
        before = _spent(client.url)
        cold = await client.chat(text, max_tokens=2, ignore_eos=True)
        between = _spent(client.url)
        warm = await client.chat(text + _MORE, max_tokens=2, ignore_eos=True)
        after = _spent(client.url)
        if warm.cached_tokens < cold.prompt_tokens // 2:
            raise PenstockError(
                f"{warm.cached_tokens} of {cold.prompt_tokens} tokens came from the store; is it "
                "large enough (--kv-memory)?"
            )
        pairs.append(
            Pair(
                cold.prompt_tokens,
                warm.cached_tokens,
                between[M.CHUNK_TIME] - before[M.CHUNK_TIME],
                after[M.RESTORE_TIME] - between[M.RESTORE_TIME],
                cold.ttft_s,
                warm.ttft_s,
            )
        )
    return row(pairs)


def row(pairs: Sequence[Pair]) -> Row:
    """Medians, and of the pairs' ratios. Pure."""
    low, middle, high = low_median_high(pair.times_faster for pair in pairs)
    return {
        "prompt_tokens": int(median([pair.prompt_tokens for pair in pairs])),
        "n": len(pairs),
        "restored_tokens": int(median([pair.cached_tokens for pair in pairs])),
        "compute_s": finite(median([pair.compute_s for pair in pairs])),
        "restore_ms": finite(median([pair.restore_s for pair in pairs]) * 1e3),
        "times_faster": finite(middle),
        "times_faster_low": finite(low),
        "times_faster_high": finite(high),
        "ttft_s": finite(median([pair.cold_ttft_s for pair in pairs])),
        "ttft_s_restored": finite(median([pair.warm_ttft_s for pair in pairs])),
        "ttft_times_faster": ratio(
            median([pair.cold_ttft_s for pair in pairs]),
            median([pair.warm_ttft_s for pair in pairs]),
        ),
    }


def _spent(url: str) -> dict[Metric, float]:
    """Seconds so far, of all prefill workers."""
    text = httpx.get(f"{url}/metrics", timeout=30, trust_env=False).text
    return {metric: sum_of(text, metric) for metric in (M.CHUNK_TIME, M.RESTORE_TIME)}


def sum_of(exposition: str, metric: Metric) -> float:
    """Of a histogram's values, over all its series. Pure."""
    name = f"{PREFIX}{metric.name}_sum"
    return sum(
        float(line.rpartition(" ")[2])
        for line in exposition.splitlines()
        if line.partition("{")[0].partition(" ")[0] == name
    )
