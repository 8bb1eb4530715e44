"""A decode worker: the credits of serving, then a continuous batch that costs time.

Between two changes of the batch every step is known in advance, so the clock jumps from change to
change: an hour of a thousand workers is a matter of seconds. Whoever opens a sequence or joins
while a step runs waits for its end; a stream's first token comes at the end of its first step
(`decode.batch`, `decode.step`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from cluster.simulate.clock import Clock
from cluster.simulate.costs import Costs
from cluster.simulate.figures import Gaps
from cluster.simulate.life import Life
from decode.credits import Ask, Credits, Need


@dataclass(slots=True, eq=False)
class _Stream:
    life: Life
    context: int
    """Tokens that the next step attends to."""


@dataclass(slots=True)
class _Run:
    """Steps of one and the same batch, from `since_s` on. `stepping` of them absorb a token."""

    since_s: float
    stepping: int
    context: int
    steps: int
    until_s: float


class DecodeWorker:
    """`grant` and `join` are called by the flow; `Life.finish` by this."""

    def __init__(
        self,
        name: str,
        costs: Costs,
        clock: Clock,
        gaps: Gaps,
        on_granted: Callable[[Life], None],
        on_first_token: Callable[[Life], None],
    ) -> None:
        self.name = name
        self.draining = False
        self.busy_s = 0.0
        self.tokens = 0
        self.step_s = 0.0
        """Of the last step."""
        self.credits = Credits(costs.decode_memory_bytes, costs.decode_running, costs.decode_queued)
        self._costs = costs
        self._clock = clock
        self._gaps = gaps
        self._on_granted = on_granted
        self._on_first_token = on_first_token
        self._asking: dict[int, Life] = {}
        self._streams: list[_Stream] = []
        self._opening: list[Life] = []
        self._joining: list[_Stream] = []
        self._run: _Run | None = None
        self._generation = 0

    @property
    def idle(self) -> bool:
        return not self.credits.running and not self.credits.queued

    @property
    def use(self) -> float:
        """Share of slots or memory that is asked for, whichever is larger."""
        credits, costs = self.credits, self._costs
        slots = (credits.running + credits.queued) / costs.decode_running
        return max(slots, credits.reserved_bytes / costs.decode_memory_bytes)

    def reserve(self, life: Life) -> None:
        """Grants (the flow hears it through `on_granted`), now or later, or refuses."""
        costs, now = self._costs, self._clock.now
        need = Need(life.reserve_tokens, costs.size_bytes(life.reserve_tokens))
        if need.size_bytes > costs.decode_memory_bytes:
            life.refuse("context length", now)
            return
        key, timeout_s = life.request.number, costs.admission_timeout_s
        patience_s = timeout_s if costs.admission else None
        refusal = self.credits.ask(Ask(key, need, patience_s=patience_s), now)
        if refusal is not None:
            life.refuse(f"decode: {refusal.reason}", now)
            return
        self._asking[key] = life
        self._hear()
        if key in self._asking:
            self._clock.after(timeout_s, self._time_out, key)

    def give_back(self, life: Life) -> None:
        """Its credit; may be called for one that never had any."""
        self.credits.give_back(life.request.number, self._clock.now)
        self._hear()

    def _hear(self) -> None:
        for key in self.credits.take_news().granted:
            life = self._asking.pop(key)
            if self._run is None:
                self._granted(life)
            else:
                self._opening.append(life)
                self._cut()

    def _granted(self, life: Life) -> None:
        life.granted_s = self._clock.now
        self.credits.use(life.request.number, self._clock.now)
        self._on_granted(life)

    def _time_out(self, key: int) -> None:
        life = self._asking.pop(key, None)
        if life is not None:
            life.refuse("decode: queue_timeout", self._clock.now)

    # The batch

    def join(self, life: Life) -> None:
        """The prompt has been attached."""
        self._joining.append(_Stream(life, life.request.prompt_tokens))
        if self._run is None:
            self._begin()
        else:
            self._cut()

    def _begin(self) -> None:
        """The next steps of all streams, and of those that have joined."""
        fresh, self._joining = self._joining, []
        stepping, context = len(self._streams), sum(s.context for s in self._streams)
        if not stepping and not fresh:
            self._run = None
            return
        now = self._clock.now
        if fresh:
            # Their first token is drawn from the state that was handed over: nothing is absorbed.
            took_s = self._costs.decode_s(stepping, context) if stepping else 0.0
            run = _Run(now, stepping, context, 1, now + took_s)
        else:
            steps = min(_left(s.life) for s in self._streams)
            run = _Run(now, stepping, context, steps, 0.0)
            run.until_s = now + self._lasts_s(run, steps)
        self._run = run
        self._generation += 1
        self._clock.at(run.until_s, self._end_of_run, self._generation, fresh)

    def _cut(self) -> None:
        """End the run at the end of the step that is under way."""
        run = self._run
        if run is None or run.steps == 1:
            return
        done = self._steps_by(run, self._clock.now)
        if done < run.steps:
            run.steps = done
            run.until_s = max(self._clock.now, run.since_s + self._lasts_s(run, done))
            self._generation += 1
            self._clock.at(run.until_s, self._end_of_run, self._generation, [])

    def _end_of_run(self, generation: int, fresh: list[_Stream]) -> None:
        run = self._run
        if run is None or generation != self._generation:
            return
        now, steps = self._clock.now, run.steps
        if run.stepping:
            lasted = now - run.since_s
            self.busy_s += lasted
            self.step_s = lasted / steps
            self._gaps.add(self.step_s, steps * run.stepping)
        self._run = None
        for stream in self._streams:
            stream.life.emitted_tokens += steps
            stream.context += steps
        for stream in fresh:
            stream.life.emitted_tokens = 1
            stream.life.first_token_s = now + self._costs.deliver_s
            self._on_first_token(stream.life)
        self.tokens += steps * len(self._streams) + len(fresh)
        self._streams += fresh
        over = [s for s in self._streams if not _left(s.life)]
        if over:
            self._streams = [s for s in self._streams if _left(s.life)]
            for stream in over:
                self._clock.after(self._costs.deliver_s, self._finish, stream.life)
        opened, self._opening = self._opening, []
        for life in opened:
            self._granted(life)
        self._begin()

    def _finish(self, life: Life) -> None:
        life.finish(self._clock.now)

    def _lasts_s(self, run: _Run, steps: int) -> float:
        """The first `steps` of a run; each one's context is longer by a token a stream."""
        costs = self._costs
        grown = run.stepping * steps * (steps - 1) / 2
        return steps * costs.decode_s(run.stepping, run.context) + costs.decode_context_s * grown

    def _steps_by(self, run: _Run, when_s: float) -> int:
        """Steps that have begun by then, at least one: the positive root of `_lasts_s`."""
        elapsed = when_s - run.since_s
        square = self._costs.decode_context_s * run.stepping / 2
        linear = self._costs.decode_s(run.stepping, run.context) - square
        if square > 1e-18:
            root = (math.sqrt(linear * linear + 4 * square * elapsed) - linear) / (2 * square)
        else:
            root = elapsed / linear
        steps = max(1, math.ceil(root - 1e-9))
        return min(steps, run.steps)


def _left(life: Life) -> int:
    return life.request.output_tokens - life.emitted_tokens
