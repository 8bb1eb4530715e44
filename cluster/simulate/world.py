"""The cluster under the virtual clock, on one page.

    arrive -> route -> reserve -> prefill (restore, chunks, publish) -> hand over -> decode -> end

The same steps in the same order as `cluster.flow`. Every request ends exactly once, served or
refused, and then holds nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from cluster.policy import DECODE, PREFILL, RoutingPolicy
from cluster.simulate.clock import Clock
from cluster.simulate.costs import Costs
from cluster.simulate.decode import DecodeWorker
from cluster.simulate.figures import PERCENTILES, Gaps, PoolUse, Result, Slo, mean, spread
from cluster.simulate.life import Life
from cluster.simulate.prefill import PrefillWorker
from cluster.simulate.routing import SimRouter
from cluster.simulate.scaling import Scaler, Scaling
from cluster.simulate.store import SimStore
from cluster.simulate.trace import SimRequest, Trace
from kvstore.policy.choice import Eviction
from penstock.errors import WorkerUnavailableError


@dataclass(frozen=True)
class Plan:
    """What is simulated."""

    costs: Costs
    prefill: int = 1
    decode: int = 1
    policy: RoutingPolicy = RoutingPolicy.COST
    store_bytes: int | None = None
    """None: a store that never evicts."""
    eviction: Eviction = Eviction.REUSE
    slo: Slo = field(default_factory=Slo)
    max_tokens: int | None = None
    """What clients ask for; None: exactly what they get."""
    scaling: Scaling | None = None
    """None: the pools keep their sizes."""


class World:
    """One simulation: `run` once."""

    def __init__(self, plan: Plan, trace: Trace) -> None:
        self.plan = plan
        self.clock = Clock()
        self.store = SimStore(
            plan.costs,
            capacity_bytes=plan.store_bytes,
            eviction=plan.eviction,
            clock=lambda: self.clock.now,
        )
        self.router = SimRouter(plan.policy, plan.costs, self.store)
        self.prefill: dict[str, PrefillWorker] = {}
        self.decode: dict[str, DecodeWorker] = {}
        self.lives: list[Life] = []
        self._trace = trace
        self._gaps = Gaps()
        self._ended = 0
        self._paid: dict[str, float] = {PREFILL: 0.0, DECODE: 0.0}
        self._gone: dict[str, list[PrefillWorker | DecodeWorker]] = {PREFILL: [], DECODE: []}
        self._open: dict[Life, None] = {}
        self._counted_s = 0.0
        self._most: dict[str, int] = {PREFILL: 0, DECODE: 0}
        self._series: list[tuple[float, int, int]] = []
        self._named = 0
        for role, count in ((PREFILL, plan.prefill), (DECODE, plan.decode)):
            for _ in range(count):
                self._new(role)
        self._changed()
        self._scaler = None if plan.scaling is None else Scaler(plan.scaling)

    def run(self) -> Result:
        for request in self._trace.requests:
            self.clock.at(request.arrival_s, self._arrive, request)
        if self._scaler is not None:
            self.clock.after(self._scaler.plan.tick_s, self._scale)
        self.clock.run()
        return self._result()

    # A request's life

    def _arrive(self, request: SimRequest) -> None:
        reserve = request.prompt_tokens + (self.plan.max_tokens or request.output_tokens)
        life = Life(request, self._on_end, max(reserve, request.prompt_tokens + 1))
        self.lives.append(life)
        self._open[life] = None
        self.clock.after(self.plan.costs.front_s, self._route, life)

    def _route(self, life: Life) -> None:
        try:
            route = self.router.route(life)
        except WorkerUnavailableError:
            life.refuse("no worker", self.clock.now)
            return
        life.prefill, life.decode = route.prefill.worker_id, route.decode.worker_id
        self.decode[life.decode].reserve(life)

    def _on_granted(self, life: Life) -> None:
        self.clock.after(self.plan.costs.reserve_s, self.prefill[life.prefill].submit, life)

    def _on_ready(self, life: Life) -> None:
        """Everything is committed: decode fetches what it lacks, the last chunk and the state."""
        costs = self.plan.costs
        last = min(costs.chunk_tokens, life.computed_tokens)
        exposed_s = costs.transfer_s(costs.size_bytes(last) + costs.state_bytes)
        self.clock.after(costs.handover_s + exposed_s, self._join, life)

    def _join(self, life: Life) -> None:
        self.store.release(life.owner)
        self.decode[life.decode].join(life)

    def _on_end(self, life: Life) -> None:
        self._ended += 1
        del self._open[life]
        self.store.release(life.owner)
        self.router.ended(life)
        if life.decode:
            self.decode[life.decode].give_back(life)
        self._let_go()

    # The pools

    def _scale(self) -> None:
        """One look of the autoscaler at both pools."""
        scaler, now = self._scaler, self.clock.now
        if scaler is None or self._ended == len(self._trace.requests):
            return
        for role, change in scaler.changes(self.prefill, self.decode, now).items():
            for _ in range(change):
                self.clock.after(scaler.plan.start_s, self._started, role)
            for name in scaler.to_drain(self.prefill, self.decode, role, -change):
                self._pool(role)[name].draining = True
        self._changed()
        self._let_go()
        self.clock.after(scaler.plan.tick_s, self._scale)

    def _started(self, role: str) -> None:
        if self._scaler is not None:
            self._scaler.started(role)
        self._new(role)
        self._changed()

    def _let_go(self) -> None:
        """Workers that were draining and have nothing left to do."""
        if self._scaler is None:
            return
        gone = False
        for role in (PREFILL, DECODE):
            pool = self._pool(role)
            for name in [name for name, w in pool.items() if w.draining and w.idle]:
                if any(name in (life.prefill, life.decode) for life in self._open):
                    # Routed there, but on its way still.
                    continue
                self._count()
                self._gone[role].append(
                    self.prefill.pop(name) if role == PREFILL else self.decode.pop(name)
                )
                gone = True
        if gone:
            self._changed()

    def _pool(self, role: str) -> Mapping[str, PrefillWorker | DecodeWorker]:
        return self.prefill if role == PREFILL else self.decode

    def _new(self, role: str) -> None:
        self._named += 1
        name, costs = f"{role}-{self._named:05d}", self.plan.costs
        if role == PREFILL:
            self.prefill[name] = PrefillWorker(
                name, costs, self.clock, self.store, self.router.read, self._on_ready
            )
        else:
            self.decode[name] = DecodeWorker(
                name, costs, self.clock, self._gaps, self._on_granted, self.router.answering
            )

    def _changed(self) -> None:
        self._count()
        workers = [(n, PREFILL, w.draining) for n, w in self.prefill.items()]
        workers += [(n, DECODE, w.draining) for n, w in self.decode.items()]
        self.router.show(workers)
        self._most[PREFILL] = max(self._most[PREFILL], len(self.prefill))
        self._most[DECODE] = max(self._most[DECODE], len(self.decode))
        self._series.append((self.clock.now, len(self.prefill), len(self.decode)))

    def _count(self) -> None:
        """Worker-seconds up to now."""
        passed_s = self.clock.now - self._counted_s
        self._paid[PREFILL] += passed_s * len(self.prefill)
        self._paid[DECODE] += passed_s * len(self.decode)
        self._counted_s = self.clock.now

    # What came of it

    def _result(self) -> Result:
        self._count()
        lives, slo = tuple(self.lives), self.plan.slo
        served = [life for life in lives if life.served]
        within = sum(1 for life in served if slo.holds(life))
        duration_s = max((life.end_s for life in lives), default=0.0)
        ttfts = [life.ttft_s for life in served]
        usage = self.store.catalog.usage()
        return Result(
            policy=self.plan.policy.value,
            requests=len(lives),
            served=len(served),
            refused=dict(Counter(life.refused for life in lives if life.refused)),
            within_slo=within,
            duration_s=duration_s,
            goodput=within / duration_s if duration_s else 0.0,
            ttft_mean_s=mean(ttfts),
            ttft_s=spread(ttfts),
            gap_s={f"p{q}": self._gaps.percentile(q) for q in PERCENTILES},
            e2e_s=spread(life.e2e_s for life in served),
            prompt_tokens=sum(life.request.prompt_tokens for life in served),
            cached_tokens=sum(life.cached_tokens for life in served),
            computed_tokens=sum(life.computed_tokens for life in served),
            answer_tokens=sum(life.emitted_tokens for life in served),
            evictions=usage.evictions,
            store_bytes=usage.used_bytes,
            prefill=self._use(PREFILL),
            decode=self._use(DECODE),
            events=self.clock.calls,
            lives=lives,
            series=tuple(self._series),
        )

    def _use(self, role: str) -> PoolUse:
        paid_s = self._paid[role]
        busy_s = sum(w.busy_s for w in [*self._pool(role).values(), *self._gone[role]])
        now = self.clock.now
        return PoolUse(
            workers_mean=paid_s / now if now else 0.0,
            workers_most=self._most[role],
            worker_s=paid_s,
            busy=busy_s / paid_s if paid_s else 0.0,
        )


def simulate(plan: Plan, trace: Trace) -> Result:
    """The same result for the same plan and trace, on any machine."""
    return World(plan, trace).run()
