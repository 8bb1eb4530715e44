"""A prefill worker: room for a prompt, restore from the store, chunks in turn, publish.

Chunks are those of `prefill.planner`; prompts that are worked on take turns, a chunk each, as
`prefill.sequence` does it. A chunk's blocks travel to the store while the next one is computed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from cluster.simulate.clock import Clock
from cluster.simulate.costs import Costs
from cluster.simulate.life import Life
from cluster.simulate.store import SimStore
from prefill.planner import Chunk, plan_chunks


@dataclass(slots=True, eq=False)
class _Prompt:
    life: Life
    size_bytes: int
    chunks: deque[Chunk]
    pending_tokens: int
    committed_s: float = 0.0


class PrefillWorker:
    """`submit` is called by the flow, which hears of the hand-over through `on_ready`."""

    def __init__(
        self,
        name: str,
        costs: Costs,
        clock: Clock,
        store: SimStore,
        on_progress: Callable[[Life, int], None],
        on_ready: Callable[[Life], None],
    ) -> None:
        self.name = name
        self.draining = False
        self.busy_s = 0.0
        self.computed_tokens = 0
        self.pending_tokens = 0
        self.used_bytes = 0
        self.running = 0
        self._costs = costs
        self._clock = clock
        self._store = store
        self._on_progress = on_progress
        self._on_ready = on_ready
        self._waiting: deque[_Prompt] = deque()
        self._ready: deque[_Prompt] = deque()
        self._computing = False
        self._link_free_s = 0.0

    @property
    def queued(self) -> int:
        return len(self._waiting)

    @property
    def idle(self) -> bool:
        return not self.running and not self._waiting

    def submit(self, life: Life) -> None:
        tokens = life.request.prompt_tokens
        prompt = _Prompt(life, self._costs.size_bytes(tokens), deque(), tokens)
        if prompt.size_bytes > self._costs.prefill_memory_bytes:
            life.refuse("context length", self._clock.now)
        elif not self._waiting and self._fits(prompt):
            self._start(prompt)
        elif len(self._waiting) >= self._costs.prefill_queued:
            life.refuse("prefill queue full", self._clock.now)
        else:
            self.pending_tokens += tokens
            self._waiting.append(prompt)

    def _fits(self, prompt: _Prompt) -> bool:
        room = self.used_bytes + prompt.size_bytes <= self._costs.prefill_memory_bytes
        return room and self.running < self._costs.prefill_running

    def _start(self, prompt: _Prompt) -> None:
        life, costs = prompt.life, self._costs
        self.pending_tokens += prompt.pending_tokens
        self.used_bytes += prompt.size_bytes
        self.running += 1
        life.prefill_began_s = self._clock.now
        position, matched = self._store.restore(life.owner, life.request)
        life.cached_tokens = position
        life.computed_tokens = life.request.prompt_tokens - position
        forks = (matched,) if matched > position else ()
        life.states = self._store.states(life.request, forks)
        self._now_pending(prompt, life.computed_tokens)
        fetch = costs.size_bytes(position) + self._store.state_bytes if position else 0
        arrives_s = self._over_the_link(fetch) + costs.restore_s
        self._clock.at(arrives_s, self._restored, prompt)

    def _restored(self, prompt: _Prompt) -> None:
        life = prompt.life
        length = life.request.prompt_tokens
        self._on_progress(life, life.cached_tokens)
        if life.cached_tokens >= length:
            self._hand_over(prompt)
            return
        prompt.chunks = deque(
            plan_chunks(length, start=life.cached_tokens, chunk_tokens=self._costs.chunk_tokens)
        )
        self._ready.append(prompt)
        self._compute()

    def _compute(self) -> None:
        if self._computing or not self._ready:
            return
        self._computing = True
        prompt = self._ready.popleft()
        chunk = prompt.chunks.popleft()
        took_s = self._costs.prefill_step_s
        took_s += self._costs.prefill_piece_s(chunk.end - chunk.start, chunk.end)
        self.busy_s += took_s
        self._clock.after(took_s, self._computed, prompt, chunk)

    def _computed(self, prompt: _Prompt, chunk: Chunk) -> None:
        self._computing = False
        tokens = chunk.end - chunk.start
        self.computed_tokens += tokens
        self._now_pending(prompt, prompt.pending_tokens - tokens)
        prompt.committed_s = self._over_the_link(
            self._costs.size_bytes(tokens) + self._store.state_bytes
        )
        self._clock.at(prompt.committed_s, self._committed, prompt, chunk)
        if prompt.chunks:
            self._ready.append(prompt)
        self._compute()

    def _committed(self, prompt: _Prompt, chunk: Chunk) -> None:
        life = prompt.life
        self._store.publish(
            life.owner, life.request, start=chunk.start, end=chunk.end, states=life.states
        )
        self._on_progress(life, chunk.end)
        if chunk.end == life.request.prompt_tokens:
            self._hand_over(prompt)

    def _hand_over(self, prompt: _Prompt) -> None:
        self.used_bytes -= prompt.size_bytes
        self.running -= 1
        self._on_ready(prompt.life)
        while self._waiting and self._fits(self._waiting[0]):
            waiting = self._waiting.popleft()
            self.pending_tokens -= waiting.pending_tokens
            self._start(waiting)

    def _now_pending(self, prompt: _Prompt, tokens: int) -> None:
        self.pending_tokens += tokens - prompt.pending_tokens
        prompt.pending_tokens = tokens

    def _over_the_link(self, size_bytes: int) -> float:
        """When so many bytes, after all that are under way, have passed."""
        begins_s = max(self._clock.now, self._link_free_s)
        self._link_free_s = begins_s + self._costs.transfer_s(size_bytes)
        return self._link_free_s
