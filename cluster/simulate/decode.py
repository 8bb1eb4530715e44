"""A decode worker: credits, then a continuous batch.

Between two changes of the batch every step is known in advance, so the clock jumps from change to
change: an hour of a thousand workers is a matter of seconds. A stream that joins while a step runs
takes part from the next one on, and its first token comes at the end of that (`decode.step`).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from cluster.simulate.clock import Clock
from cluster.simulate.costs import Costs
from cluster.simulate.figures import Gaps
from cluster.simulate.life import Life
from decode.admission import Need


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
        self.reserved_bytes = 0
        self.running = 0
        self._costs = costs
        self._clock = clock
        self._gaps = gaps
        self._on_granted = on_granted
        self._on_first_token = on_first_token
        self._waiting: deque[tuple[Life, Need, float]] = deque()
        self._needs: dict[Life, Need] = {}
        self._streams: list[_Stream] = []
        self._joining: list[_Stream] = []
        self._run: _Run | None = None
        self._generation = 0

    # Credits (first come, first served, as `decode.admission`)

    @property
    def queued(self) -> int:
        return len(self._waiting)

    @property
    def idle(self) -> bool:
        return not self.running and not self._waiting

    def reserve(self, life: Life) -> None:
        """Grants (the flow hears it through `on_granted`), now or later, or refuses."""
        need = Need(life.reserve_tokens, self._costs.size_bytes(life.reserve_tokens))
        if need.size_bytes > self._costs.decode_memory_bytes:
            life.refuse("context length", self._clock.now)
        elif not self._waiting and self._fits(need):
            self._take(life, need)
        elif len(self._waiting) >= self._costs.decode_queued:
            life.refuse("decode queue full", self._clock.now)
        else:
            deadline = self._clock.now + self._costs.admission_timeout_s
            self._waiting.append((life, need, deadline))
            self._clock.at(deadline, self._time_out)

    def give_back(self, life: Life) -> None:
        """Its credit; may be called for one that never had any."""
        need = self._needs.pop(life, None)
        if need is not None:
            self.reserved_bytes -= need.size_bytes
            self.running -= 1
            self._admit()

    def _fits(self, need: Need) -> bool:
        room = self.reserved_bytes + need.size_bytes <= self._costs.decode_memory_bytes
        return room and self.running < self._costs.decode_running

    def _take(self, life: Life, need: Need) -> None:
        self._needs[life] = need
        self.reserved_bytes += need.size_bytes
        self.running += 1
        life.granted_s = self._clock.now
        self._on_granted(life)

    def _admit(self) -> None:
        while self._waiting and self._fits(self._waiting[0][1]):
            life, need, _ = self._waiting.popleft()
            self._take(life, need)

    def _time_out(self) -> None:
        while self._waiting and self._waiting[0][2] <= self._clock.now:
            self._waiting.popleft()[0].refuse("no credit in time", self._clock.now)
            self._admit()

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
