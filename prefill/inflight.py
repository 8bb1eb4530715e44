"""Prompts that are being read now, by their blocks: a prompt whose beginning another one is reading
waits for it instead of reading it again.

The leader of a block is the first prompt that has it. Who waits holds no memory; it lends its class
to the leader, and the leader keeps a state where the two part. When the leader has committed what
they share, or has ended in whatever way, those that wait look again, in the order in which they
came: the first of them leads the rest.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from penstock.blocks import BLOCK_TOKENS
from prefill.planner import ChunkPlan
from prefill.scheduler import Ticket


@dataclass(eq=False)
class Lead:
    """One prompt that leads some blocks."""

    ticket: Ticket
    blocks: Sequence[bytes]
    committed: int = 0
    """Tokens from its start on that the store has."""
    ended: bool = False
    keep_at: set[int] = field(default_factory=set)
    """Positions at which others part from it."""
    plan: ChunkPlan | None = None
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    def reached(self, position: int) -> None:
        self.committed = max(self.committed, position)
        self._tell()

    def keep(self, position: int) -> None:
        """Somebody waits for what it has in common with this prompt, up to `position`."""
        self.keep_at.add(position)
        self._serve()

    def reads(self, plan: ChunkPlan) -> None:
        """From now on by this plan."""
        self.plan = plan
        self._serve()

    def _serve(self) -> None:
        if self.plan is not None and self.keep_at:
            self.plan.keep_ends = True
            for position in self.keep_at:
                self.plan.keep(position)

    def end(self) -> None:
        self.ended = True
        self._tell()

    async def has(self, position: int) -> None:
        """Until everything before `position` is committed, or the lead has ended."""
        while self.committed < position and not self.ended:
            await self._news.wait()

    def _tell(self) -> None:
        # Everyone who waits now wakes, in the order of coming.
        self._news.set()
        self._news = asyncio.Event()


@dataclass
class InFlight:
    """Belongs to one event loop. Empty when nothing is being read."""

    waits: int = 0
    """How often a prompt waited for another one's blocks."""
    spared_tokens: int = 0
    """Tokens that were waited for instead of being computed again."""
    _leads: dict[bytes, Lead] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self._leads)

    async def clear(self, ticket: Ticket, blocks: Sequence[bytes]) -> None:
        """Until nobody is reading a part of these blocks that the store lacks."""
        while True:
            lead, shared = self._leader(blocks)
            if lead is None or lead.committed >= shared:
                return
            self.waits += 1
            before = lead.committed
            lead.keep(shared)
            lead.ticket.hurry(ticket.priority)
            await lead.has(shared)
            self.spared_tokens += max(0, min(shared, lead.committed) - before)

    @contextmanager
    def leading(self, ticket: Ticket, blocks: Sequence[bytes]) -> Iterator[Lead]:
        """While the block runs, others wait for what this prompt is the first to read."""
        lead = Lead(ticket, blocks)
        mine = [id_ for id_ in blocks if id_ not in self._leads]
        self._leads.update(dict.fromkeys(mine, lead))
        try:
            yield lead
        finally:
            for id_ in mine:
                del self._leads[id_]
            lead.end()

    def _leader(self, blocks: Sequence[bytes]) -> tuple[Lead | None, int]:
        """Who leads the last block that is led, and how many tokens it shares."""
        for index in range(len(blocks) - 1, -1, -1):
            lead = self._leads.get(blocks[index])
            if lead is not None:
                return lead, (index + 1) * BLOCK_TOKENS
        return None, 0
