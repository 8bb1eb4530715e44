"""The simulator beside a real cluster: `penstock simulate TRACE --against URL|fake`.

Costs are fitted on what clients see of one trace, then another trace is sent to the same cluster
and given to the simulator. Nothing of the second one reaches the fit.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from bench.client import Client
from bench.fit import fit
from bench.replay import Seen, check_lengths, replay
from bench.report import Report, Row
from bench.stats import finite, percentile, ratio
from cluster.config import ClusterConfig
from cluster.simulate.figures import PERCENTILES, Result
from cluster.simulate.trace import Trace
from cluster.simulate.world import Plan, simulate

_SHOWS_NOT = (
    "models: a fake's steps take the time that they are told; what is checked is who waits when",
    "percentiles beyond 1 - 1/n of n requests",
)
_WARM_UP = 3
MEASURES = ("ttft", "itl", "e2e")
# The fake's end token has no text: its event could not be seen.
_NO_END = {"logit_bias": {"256": -100}}


def run(
    plan: Plan,
    trace: Trace,
    fit_on: Trace,
    *,
    config: ClusterConfig | None,
    url: str | None,
    model: str,
    key: str | None = None,
) -> Report:
    """Measures `url`, or a cluster of `config` that it starts and stops. Exactly one is given."""
    began_s = time.monotonic()
    with _server(config, url) as base:
        fields = {} if config is None else _NO_END
        light, heavy = asyncio.run(_measure(base, model, key, fit_on, trace, fields))
    costs = fit(light, plan, fit_on)
    predicted = simulate(replace(plan, costs=costs), trace)
    fitted = simulate(replace(plan, costs=costs), fit_on)
    coefficients = ("prefill_tokens_per_s", "decode_step_s", "decode_stream_s", "front_s")
    return Report(
        bench="reality",
        settings={
            "trace": trace.name,
            "requests": len(trace.requests),
            "fitted_on": fit_on.name,
            "fitted_on_requests": len(fit_on.requests),
            "prefill": plan.prefill,
            "decode": plan.decode,
            "policy": plan.policy.value,
            "hit_rate": {"measured": hit_rate(heavy), "predicted": predicted.hit_rate},
            "fitted": {name: getattr(costs, name) for name in coefficients},
            "server": "given by --against" if config is None else config.launcher.kind,
        },
        tables=rows(trace.name, heavy, predicted)
        | rows(f"{fit_on.name} (fitted on)", light, fitted, only=("ttft",)),
        shows_not=_SHOWS_NOT,
        wall_s=time.monotonic() - began_s,
    )


def rows(
    name: str, seen: Sequence[Seen], predicted: Result, *, only: Sequence[str] = MEASURES
) -> dict[str, list[Row]]:
    """A table a measure: percentiles side by side; `off` is predicted / measured - 1. Pure."""
    measured = {
        "ttft": [each.answer.ttft_s for each in seen],
        "itl": [gap for each in seen for gap in each.answer.event_gaps_s],
        "e2e": [each.answer.ended_s - each.answer.sent_s for each in seen],
    }
    simulated = {"ttft": predicted.ttft_s, "itl": predicted.gap_s, "e2e": predicted.e2e_s}
    tables: dict[str, list[Row]] = {}
    for measure in only:
        found: list[Row] = []
        for q in PERCENTILES:
            real_s = percentile(measured[measure], q)
            told_s = simulated[measure][f"p{q}"]
            part = ratio(told_s, real_s)
            found.append(
                {
                    measure: f"p{q}",
                    "n": len(measured[measure]),
                    "measured_ms": finite(real_s * 1e3),
                    "predicted_ms": finite(told_s * 1e3),
                    "off_percent": None if part is None else 100 * (part - 1),
                }
            )
        tables[f"{measure}: {name}"] = found
    return tables


def hit_rate(seen: Sequence[Seen]) -> float | None:
    """Of all prompt tokens."""
    cached = sum(each.answer.cached_tokens for each in seen)
    return ratio(cached, sum(each.answer.prompt_tokens for each in seen))


async def _measure(
    url: str,
    model: str,
    key: str | None,
    fit_on: Trace,
    trace: Trace,
    fields: dict[str, Any],
) -> tuple[list[Seen], list[Seen]]:
    async with Client(url, model=model, api_key=key) as client:
        for _ in range(_WARM_UP):
            # Connections, lazy imports and caches of code are not what is measured.
            letters = random.choices(range(97, 123), k=300)
            await client.complete(letters, max_tokens=4, ignore_eos=True)
        light = await replay(fit_on, client, **fields)
        heavy = await replay(trace, client, **fields)
    check_lengths(light + heavy)
    return light, heavy


@contextlib.contextmanager
def _server(config: ClusterConfig | None, url: str | None) -> Iterator[str]:
    if config is None:
        yield url or ""
        return
    from cluster.launch import started

    with started(config) as endpoint:
        yield endpoint.url
