"""The autoscaler on a whole simulated cluster: days and bursts, against fixed sizes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.autoscale import AutoscalingSection
from cluster.simulate.costs import PRESETS
from cluster.simulate.figures import Result, Slo
from cluster.simulate.overload import sweep
from cluster.simulate.scaling import Scaling
from cluster.simulate.trace import Drawn, draw
from cluster.simulate.world import Plan, World, simulate

COSTS = PRESETS["fake"].model_copy(update={"decode_running": 8, "prefill_tokens_per_s": 8000.0})
FAST = {"down_hold_s": 10.0, "down_pause_s": 3.0}
SCALING = Scaling(
    prefill=AutoscalingSection(max_replicas=6, queue_s=0.5, **FAST),
    decode=AutoscalingSection(max_replicas=6, token_gap_ms=50, use=0.7, **FAST),
    tick_s=1.0,
    start_s=3.0,
)
DAY = draw(Drawn(requests=1200, rate=8, prompt=1200, answer=120, period=150), seed=4)
PLAN = Plan(COSTS, slo=Slo(ttft_s=2.0, gap_s=0.05))


def fixed(workers: int) -> Result:
    return simulate(replace(PLAN, prefill=workers, decode=workers), DAY)


@pytest.fixture(scope="module")
def scaled() -> tuple[World, Result]:
    world = World(replace(PLAN, scaling=SCALING), DAY)
    return world, world.run()


def test_a_day_is_served_as_by_the_largest_pool_for_much_less(
    scaled: tuple[World, Result],
) -> None:
    _, result = scaled
    small, large = fixed(1), fixed(6)
    assert result.served == large.served == 1200
    assert large.within > 0.99 and small.within < 0.5
    assert result.within > 0.9
    paid = result.prefill.worker_s + result.decode.worker_s
    assert paid < 0.6 * (large.prefill.worker_s + large.decode.worker_s)
    # Up and down again, within the bounds (one may be draining beside them).
    for at in (1, 2):
        counts = [point[at] for point in result.series]
        assert min(counts) >= 1 and 2 < max(counts) <= 7 and counts[-1] < max(counts)


def test_a_draining_worker_ends_what_it_has_and_then_goes(scaled: tuple[World, Result]) -> None:
    world, result = scaled
    for life in result.lives:
        assert life.served and life.emitted_tokens == life.request.output_tokens
    gone = [worker for pool in world._gone.values() for worker in pool]
    assert gone and all(worker.draining and worker.idle for worker in gone)
    assert {worker.name.split("-")[0] for worker in gone} == {"prefill", "decode"}


def test_scaling_is_deterministic_too() -> None:
    few = DAY.scaled(limit=250)
    once, again = (simulate(replace(PLAN, scaling=SCALING), few).to_json() for _ in range(2))
    assert once == again


def test_at_three_times_the_load_admission_keeps_what_the_rest_loses() -> None:
    costs = COSTS.model_copy(update={"decode_running": 32})
    plan = Plan(costs, prefill=1, decode=1, slo=Slo(ttft_s=2.0, gap_s=0.05))
    trace = draw(Drawn(requests=500, rate=6, prompt=1200, answer=30, spread=0.4), seed=2)
    low, high = sweep(plan, trace, [0.8, 3.0])
    assert high.offered == pytest.approx(3.75 * low.offered)
    assert low.admitted.within > 0.97
    assert high.admitted.goodput > 0.9 * low.admitted.goodput
    assert high.everything.goodput < 0.5 * low.admitted.goodput
    assert high.everything.served == 500 > high.admitted.served
    assert set(high.admitted.refused) <= {"prefill: predicted_wait", "decode: predicted_wait"}
