"""A prefill worker: the scheduler of serving, steps that cost time, restore and publish by bytes.

The way of a prompt is that of `prefill.job`: entered, clear of duplicates, a place, opened,
restored, read in shared steps, published while the next step runs. What touches the model's thread
waits for the step under way.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

from cluster.simulate.clock import Clock
from cluster.simulate.costs import Costs
from cluster.simulate.duplicates import Duplicates, Lead
from cluster.simulate.life import Life
from cluster.simulate.store import SimStore
from penstock.errors import ContextLengthError, OverloadedError
from prefill.planner import Chunk, ChunkPlan
from prefill.scheduler import PromptScheduler, Ticket, Wish


@dataclass(eq=False)
class _Prompt:
    life: Life
    ticket: Ticket
    entered: ExitStack
    lead: Lead | None = None
    plan: ChunkPlan | None = None
    committed: int = 0
    travelling: int = 0
    """Chunks on their way to the store."""
    under_way: bool = False
    """The step that runs reads some of it."""
    started: bool = False

    @property
    def is_ready(self) -> bool:
        reads = self.plan is not None and not self.plan.is_done
        return reads and not self.ticket.resting and not self.under_way


class PrefillWorker:
    """`submit` is called by the flow, which hears of progress and of the hand-over."""

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
        self.scheduler = PromptScheduler(
            capacity_bytes=costs.prefill_memory_bytes,
            max_running=costs.prefill_running,
            max_queued=costs.prefill_queued,
            queue_timeout_s=float("inf"),
            chunk_tokens=costs.chunk_tokens,
            clock=lambda: clock.now,
        )
        self._costs = costs
        self._clock = clock
        self._store = store
        self._on_progress = on_progress
        self._on_ready = on_ready
        self._duplicates = Duplicates()
        self._prompts: dict[int, _Prompt] = {}
        self._between: list[Callable[[], None]] = []
        """Waits for the model's thread."""
        self._stepping = False
        self._link_free_s = 0.0

    @property
    def idle(self) -> bool:
        return not self._prompts and not self._duplicates

    def submit(self, life: Life) -> None:
        tokens, entered = life.request.prompt_tokens, ExitStack()
        wish = Wish(
            tokens, self._costs.size_bytes(tokens), most_wait_s=self._costs.most_prefill_wait_s
        )
        try:
            ticket = entered.enter_context(self.scheduler.entered(wish))
        except ContextLengthError:
            life.refuse("context length", self._clock.now)
        except OverloadedError as error:
            life.refuse(f"prefill: {error.reason}", self._clock.now)
        else:
            prompt = _Prompt(life, ticket, entered)
            self._prompts[ticket.key] = prompt
            self._first(prompt)

    def _first(self, prompt: _Prompt) -> None:
        """Until nobody else is reading what this prompt begins with."""
        blocks = prompt.life.request.blocks
        lead, shared = self._duplicates.leader(blocks)
        if lead is not None and lead.committed < shared:
            lead.ticket.hurry(prompt.ticket.priority)
            lead.wait(shared, partial(self._first, prompt))
            return
        prompt.lead = self._duplicates.lead(prompt.ticket, blocks)
        self._claim(prompt)

    def _claim(self, prompt: _Prompt) -> None:
        opened = partial(self._on_thread, partial(self._restore, prompt))
        # Not inside the scheduler's own loop over what it grants.
        self.scheduler.claim(prompt.ticket, partial(self._clock.after, 0.0, opened))

    def _restore(self, prompt: _Prompt) -> None:
        life, costs = prompt.life, self._costs
        prompt.ticket.on_rest = partial(self._rest, prompt)
        position = prompt.committed
        if not prompt.started:
            prompt.started = True
            life.prefill_began_s = self._clock.now
            position, matched = self._store.restore(life.owner, life.request)
            life.cached_tokens = position
            life.computed_tokens = life.request.prompt_tokens - position
            life.forks = (matched,) if matched > position else ()
        fetch = costs.size_bytes(position) + self._store.state_bytes if position else 0
        arrives_s = self._over_the_link(fetch) + costs.restore_s
        attached = partial(self._restored, prompt, position)
        if position:
            # Blocks, then the state: two pieces of work on the thread.
            attached = partial(self._on_thread, partial(self._on_thread, attached))
        self._clock.at(arrives_s, attached)

    def _restored(self, prompt: _Prompt, position: int) -> None:
        length = prompt.life.request.prompt_tokens
        prompt.committed = position
        prompt.ticket.remaining = length - position
        if prompt.lead is not None:
            prompt.lead.reached(position)
        self._on_progress(prompt.life, position)
        if position == length:
            self._hand_over(prompt)
            return
        prompt.plan = ChunkPlan(length, start=position, boundaries=prompt.life.forks)
        if prompt.lead is not None:
            prompt.lead.reads(prompt.plan)
        self._step()

    def _step(self) -> None:
        if self._stepping:
            return
        ready = {key: prompt for key, prompt in self._prompts.items() if prompt.is_ready}
        if not ready:
            return
        parts: list[tuple[_Prompt, Chunk]] = []
        took_s = self._costs.prefill_step_s
        for grant in self.scheduler.plan([prompt.ticket for prompt in ready.values()]):
            prompt = ready[grant.key]
            if prompt.plan is not None:
                chunk = prompt.plan.take(grant.tokens)
                took_s += self._costs.prefill_piece_s(chunk.end - chunk.start, chunk.end)
                prompt.under_way = True
                parts.append((prompt, chunk))
        self._stepping = True
        self.busy_s += took_s
        self._clock.after(took_s, self._stepped, parts, took_s)

    def _stepped(self, parts: list[tuple[_Prompt, Chunk]], took_s: float) -> None:
        self._stepping = False
        readers = [p.ticket for p in self._prompts.values() if p.plan is not None]
        read = 0
        for prompt, chunk in parts:
            tokens = chunk.end - chunk.start
            read += tokens
            prompt.under_way = False
            prompt.travelling += 1
            self.scheduler.served(prompt.ticket, tokens, readers)
            states = self._store.state_bytes * len(chunk.states_at)
            committed_s = self._over_the_link(self._costs.size_bytes(tokens) + states)
            self._clock.at(committed_s, self._committed, prompt, chunk)
        self.computed_tokens += read
        self.scheduler.measured(read, took_s)
        between, self._between = self._between, []
        for call in between:
            call()
        self._step()

    def _committed(self, prompt: _Prompt, chunk: Chunk) -> None:
        life = prompt.life
        self._store.publish(life.owner, life.request, chunk)
        prompt.committed = chunk.end
        prompt.travelling -= 1
        if prompt.lead is not None:
            prompt.lead.reached(chunk.end)
        self._on_progress(life, chunk.end)
        if chunk.end == life.request.prompt_tokens:
            self._hand_over(prompt)
        elif prompt.ticket.resting:
            self._rest(prompt)

    def _rest(self, prompt: _Prompt) -> None:
        """Give the place back once all that was read is committed; claim one again."""
        plan = prompt.plan
        if prompt.under_way or prompt.travelling or plan is None or plan.is_done:
            return
        prompt.plan = None
        self._clock.after(0.0, self._rested, prompt)

    def _rested(self, prompt: _Prompt) -> None:
        self.scheduler.give_back(prompt.ticket)
        self._claim(prompt)

    def _hand_over(self, prompt: _Prompt) -> None:
        prompt.plan = None
        del self._prompts[prompt.ticket.key]
        self.scheduler.give_back(prompt.ticket)
        prompt.entered.close()
        if prompt.lead is not None:
            self._duplicates.end(prompt.lead)
        self._on_ready(prompt.life)

    def _on_thread(self, call: Callable[[], None]) -> None:
        """Now if no step runs, else at its end."""
        if self._stepping:
            self._between.append(call)
        else:
            call()

    def _over_the_link(self, size_bytes: int) -> float:
        """When so many bytes, after all that are under way, have passed."""
        begins_s = max(self._clock.now, self._link_free_s)
        self._link_free_s = begins_s + self._costs.transfer_s(size_bytes)
        return self._link_free_s
