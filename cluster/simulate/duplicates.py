"""Prompts that a prefill worker is reading, by their blocks: a prompt whose beginning another one
is reading waits for it. As `prefill.inflight`, with calls in place of an event loop.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from penstock.blocks import BLOCK_TOKENS
from prefill.planner import ChunkPlan
from prefill.scheduler import Ticket


@dataclass(eq=False)
class Lead:
    """One prompt that leads some blocks."""

    ticket: Ticket
    mine: tuple[bytes, ...]
    committed: int = 0
    plan: ChunkPlan | None = None
    _keep_at: set[int] = field(default_factory=set)
    _waiting: list[tuple[int, Callable[[], None]]] = field(default_factory=list)

    def wait(self, position: int, call: Callable[[], None]) -> None:
        """`call` when everything before `position` is committed, or the lead has ended."""
        self._keep_at.add(position)
        self._serve()
        self._waiting.append((position, call))

    def reads(self, plan: ChunkPlan) -> None:
        self.plan = plan
        self._serve()

    def reached(self, position: int) -> None:
        self.committed = max(self.committed, position)
        ready = [call for at, call in self._waiting if at <= self.committed]
        self._waiting = [each for each in self._waiting if each[0] > self.committed]
        for call in ready:
            call()

    def end(self) -> None:
        waiting, self._waiting = self._waiting, []
        for _, call in waiting:
            call()

    def _serve(self) -> None:
        if self.plan is not None and self._keep_at:
            self.plan.keep_ends = True
            for position in self._keep_at:
                self.plan.keep(position)


class Duplicates:
    """Of one worker. Empty when nothing is being read."""

    def __init__(self) -> None:
        self._leads: dict[bytes, Lead] = {}

    def __len__(self) -> int:
        return len(self._leads)

    def leader(self, blocks: tuple[bytes, ...]) -> tuple[Lead | None, int]:
        """Who leads the last block that is led, and how many tokens it shares."""
        for index in range(len(blocks) - 1, -1, -1) if self._leads else ():
            lead = self._leads.get(blocks[index])
            if lead is not None:
                return lead, (index + 1) * BLOCK_TOKENS
        return None, 0

    def lead(self, ticket: Ticket, blocks: tuple[bytes, ...]) -> Lead:
        """Others wait for what this prompt is the first to read."""
        lead = Lead(ticket, tuple(id_ for id_ in blocks if id_ not in self._leads))
        self._leads.update(dict.fromkeys(lead.mine, lead))
        return lead

    def end(self, lead: Lead) -> None:
        for id_ in lead.mine:
            del self._leads[id_]
        lead.end()
