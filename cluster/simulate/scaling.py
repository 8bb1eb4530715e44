"""The autoscaler under the virtual clock: `cluster.autoscale` on the signals of virtual workers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from cluster.autoscale import (
    AutoscalingSection,
    Memory,
    Signals,
    decode_signals,
    prefill_signals,
    target,
)
from cluster.policy import DECODE, PREFILL
from cluster.simulate.decode import DecodeWorker
from cluster.simulate.prefill import PrefillWorker


@dataclass(frozen=True)
class Scaling:
    """Which pools are scaled (None: its size stays), and how fast things happen."""

    prefill: AutoscalingSection | None = None
    decode: AutoscalingSection | None = None
    tick_s: float = 2.0
    """Between two looks."""
    start_s: float = 30.0
    """Until a worker that was asked for takes work: a node, an image, weights."""

    def section(self, role: str) -> AutoscalingSection | None:
        return self.prefill if role == PREFILL else self.decode


@dataclass
class Scaler:
    """Remembers what was asked for and what the pure function wants remembered."""

    plan: Scaling
    _memory: dict[str, Memory] = field(default_factory=dict)
    _starting: dict[str, int] = field(default_factory=dict)

    def changes(
        self,
        prefill: Mapping[str, PrefillWorker],
        decode: Mapping[str, DecodeWorker],
        now_s: float,
    ) -> dict[str, int]:
        """Workers to add (or, negative, to drain) by role."""
        found: dict[str, int] = {}
        for role in (PREFILL, DECODE):
            section = self.plan.section(role)
            if section is None:
                continue
            signals = (
                _of_prefill(section, prefill) if role == PREFILL else _of_decode(section, decode)
            )
            current = signals.workers + self._starting.get(role, 0)
            memory = self._memory.get(role, Memory())
            wanted = target(section, current=current, signals=signals, memory=memory, now_s=now_s)
            self._memory[role] = wanted.memory
            found[role] = wanted.workers - current
            self._starting[role] = self._starting.get(role, 0) + max(0, found[role])
        return found

    def started(self, role: str) -> None:
        self._starting[role] -= 1

    def to_drain(
        self,
        prefill: Mapping[str, PrefillWorker],
        decode: Mapping[str, DecodeWorker],
        role: str,
        count: int,
    ) -> list[str]:
        """Those with the least to do, the youngest first."""
        if count <= 0:
            return []
        if role == PREFILL:
            work = {n: w.scheduler.pending_tokens for n, w in prefill.items() if not w.draining}
        else:
            work = {n: w.credits.running for n, w in decode.items() if not w.draining}
        return sorted(sorted(work, reverse=True), key=lambda name: work[name])[:count]


def _of_prefill(section: AutoscalingSection, pool: Mapping[str, PrefillWorker]) -> Signals:
    live = [worker.scheduler for worker in pool.values() if not worker.draining]
    return prefill_signals(
        section,
        queued_tokens=[scheduler.pending_tokens for scheduler in live],
        tokens_per_s=[scheduler.tokens_per_s for scheduler in live],
        age_s=0.0,
    )


def _of_decode(section: AutoscalingSection, pool: Mapping[str, DecodeWorker]) -> Signals:
    live = [worker for worker in pool.values() if not worker.draining]
    return decode_signals(
        section,
        token_gaps_s=[worker.step_s if worker.credits.running else 0.0 for worker in live],
        use=[worker.use for worker in live],
        age_s=0.0,
    )
