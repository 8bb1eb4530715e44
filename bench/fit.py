"""Costs of a running server from what the clients of a light trace saw. Pure.

    time to first token = fixed + tokens that were computed * seconds a token + waits
    gap between two tokens = a step + streams that were answering then * seconds a stream

Both lines by medians of slopes (Theil-Sen), so that single hiccups of a busy machine move nothing.
Waits are whatever the simulator says of the same trace: what it explains is no fixed time, so the
first line is fitted again on what is left, some rounds; the best one counts.
"""

from __future__ import annotations

import bisect
import itertools
import random
from collections.abc import Sequence
from dataclasses import replace

from bench.replay import Seen
from bench.stats import median
from cluster.simulate.costs import Costs
from cluster.simulate.trace import Trace
from cluster.simulate.world import Plan, simulate
from penstock.errors import PenstockError

_LEAST_REQUESTS = 8
_MOST_PAIRS = 20_000
_ROUNDS = 10
_LEAST_TOKEN_S = 1e-9


def fit(seen: Sequence[Seen], plan: Plan, trace: Trace) -> Costs:
    """The plan's costs with the speeds and fixed times that `seen`, of `trace`, shows. Raises
    PenstockError if that is too little to tell.
    """
    if len(seen) < _LEAST_REQUESTS:
        raise PenstockError(
            f"{len(seen)} requests are too few to fit costs on; {_LEAST_REQUESTS} at least"
        )
    new = [float(each.request.prompt_tokens - each.answer.cached_tokens) for each in seen]
    ttft = [each.answer.ttft_s for each in seen]
    stream_s, step_s = line(*_gaps(seen))
    token_s, fixed_s = line(new, ttft)
    best, least = None, float("inf")
    for _ in range(_ROUNDS):
        token_s, fixed_s = max(token_s, _LEAST_TOKEN_S), max(0.0, fixed_s)
        costs = _costs(plan.costs, token_s, fixed_s, step_s, stream_s)
        lives = simulate(replace(plan, costs=costs), trace).lives
        told = {life.request.number: life.ttft_s for life in lives}
        left = [real - told[each.request.number] for real, each in zip(ttft, seen, strict=True)]
        off = sum(map(abs, left))
        if off < least:
            best, least = costs, off
        more_token_s, more_fixed_s = line(new, left)
        token_s, fixed_s = token_s + more_token_s, fixed_s + more_fixed_s
    if best is None or step_s <= 0 or 1 / best.prefill_tokens_per_s <= _LEAST_TOKEN_S:
        raise PenstockError(
            "longer prompts did not take longer: the trace to fit on needs prompts of different "
            "lengths, and a server that is slower than the machine is noisy"
        )
    return best


def _costs(base: Costs, token_s: float, fixed_s: float, step_s: float, stream_s: float) -> Costs:
    return base.model_copy(
        update={
            "prefill_tokens_per_s": 1 / token_s,
            "prefill_context_s": 0.0,
            "prefill_step_s": 0.0,
            "decode_step_s": max(step_s, _LEAST_TOKEN_S),
            "decode_stream_s": max(0.0, stream_s),
            "decode_context_s": 0.0,
            # All that is fixed stands together: where it is spent does not show from outside.
            "front_s": max(0.0, fixed_s) / 2,
            "handover_s": max(0.0, fixed_s) / 2,
            "reserve_s": 0.0,
            "restore_s": 0.0,
            "deliver_s": 0.0,
        }
    )


def line(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float]:
    """Slope and intercept: the median of the slopes of all pairs, and of what is left."""
    pairs = [(i, j) for i, j in itertools.combinations(range(len(xs)), 2) if xs[i] != xs[j]]
    if len(pairs) > _MOST_PAIRS:
        pairs = random.Random(0).sample(pairs, _MOST_PAIRS)
    slope = median([(ys[j] - ys[i]) / (xs[j] - xs[i]) for i, j in pairs]) if pairs else 0.0
    return slope, median([y - slope * x for x, y in zip(xs, ys, strict=True)])


def _gaps(seen: Sequence[Seen]) -> tuple[list[float], list[float]]:
    """Every gap, and how many streams were answering when it ended."""
    spans = [each.answer.event_times_s for each in seen]
    begins = sorted(times[0] for times in spans)
    ends = sorted(times[-1] for times in spans)
    streams, gaps = list[float](), list[float]()
    for times in spans:
        for before, after in itertools.pairwise(times):
            gaps.append(after - before)
            answering = bisect.bisect_left(begins, after) - bisect.bisect_left(ends, after)
            streams.append(float(max(1, answering)))
    if len(gaps) > 2000:
        kept = random.Random(0).sample(range(len(gaps)), 2000)
        streams, gaps = [streams[i] for i in kept], [gaps[i] for i in kept]
    return streams, gaps
