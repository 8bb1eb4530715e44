"""What a cluster serves well under more and more load, with its admission and without any."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cluster.simulate.costs import Costs
from cluster.simulate.figures import Result
from cluster.simulate.trace import Trace
from cluster.simulate.world import Plan, simulate

_PATIENCE = 0.4
"""Share of the SLO's time to first token that each line may be predicted to take. There are two,
and shorter prompts that come later go first: of 0.8 most of what was let in came too late."""


@dataclass(frozen=True)
class Point:
    """One load. `offered`: requests a second."""

    speed: float
    offered: float
    admitted: Result
    """Predicted waits beyond the SLO are refused at once, queues are bounded."""
    everything: Result
    """Everybody is let in and waits."""


def sweep(plan: Plan, trace: Trace, speeds: Sequence[float]) -> list[Point]:
    """The same requests, faster and faster."""
    points = []
    for speed in speeds:
        faster = trace.scaled(speed=speed)
        offered = len(faster.requests) / faster.duration_s if faster.duration_s else 0.0
        points.append(
            Point(
                speed,
                offered,
                simulate(replace(plan, costs=with_admission(plan)), faster),
                simulate(replace(plan, costs=without_admission(plan.costs)), faster),
            )
        )
    return points


def with_admission(plan: Plan) -> Costs:
    patience_s = _PATIENCE * plan.slo.ttft_s
    return plan.costs.model_copy(
        update={
            "admission": True,
            "most_prefill_wait_s": patience_s,
            "admission_timeout_s": patience_s,
        }
    )


def without_admission(costs: Costs) -> Costs:
    return costs.model_copy(
        update={
            "admission": False,
            "most_prefill_wait_s": None,
            "admission_timeout_s": 1e9,
            "decode_queued": 1 << 40,
            "prefill_queued": 1 << 40,
        }
    )
