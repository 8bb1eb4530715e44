"""An answer's room while it is written: it grows, or the answer rests and comes back.

A request begins with room for its prompt and a part of its answer (`decode.answer_room_tokens`).
Before that is used up it asks for more. If there is no more, those that rank before it grow at its
cost: it leaves the batch between two steps, its blocks and its state are in the store and leased,
its memory goes back, and it waits in line. Then it attaches what it had and goes on. Neither
changes a token, and nothing is lost: who cannot rest, stays.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from decode.admission import Credit, Need
from decode.attach import attach_prompt, keep_leased
from decode.publisher import OutputPublisher
from decode.sequence import HeldSequence
from decode.stream import Stream
from decode.takeover import cut, replay, resume_point
from kvstore.contracts import BlockStore
from penstock.errors import PenstockError
from penstock.identity import Chain

_EARLY_PART = 4
"""More is asked for when this part of a growth is left, so that a step seldom has to wait."""
SETTLE_S = 5.0
"""How long the store may take for what is left, before the answer stays where it is."""

_AGAIN_S = 1.0
_log = logging.getLogger(__name__)


@dataclass
class Room:
    """One answer's, from when it joins the batch to its end."""

    store: BlockStore
    credit: Credit
    base: Chain
    """What the stream's tokens come after."""
    prompt_tokens: int
    growth: int
    """By how many tokens it grows."""
    capacity: int
    """Tokens that the answer may grow to, its prompt included."""
    bytes_for: Callable[[int], int]
    sequence: HeldSequence
    stream: Stream
    publisher: OutputPublisher
    owner: str
    """Of leases while it rests."""
    lease_ttl_s: float
    wake: Callable[[], None]
    """The batch looks at its streams again."""
    settled: Callable[[], asyncio.Future[None]]
    """Done when the step under way is."""
    counters: Counter[str] = field(default_factory=Counter)
    _poke: asyncio.Event = field(default_factory=asyncio.Event)

    async def keep(self) -> None:
        """Until cancelled. A failure ends the stream, not the worker."""
        self.credit.on_rest = self._poke.set
        self.stream.on_drawn = self._look
        self.credit.ready()
        try:
            while True:
                if self.credit.must_rest:
                    await self._rest()
                elif self._is_low:
                    await self._grow()
                else:
                    self._poke.clear()
                    await self._poke.wait()
        except PenstockError as error:
            self.stream.fail(error)

    def _look(self) -> None:
        self.credit.got_on()
        if self._is_low:
            self._poke.set()

    @property
    def _is_low(self) -> bool:
        left = self.stream.limit - self.stream.sequence.position
        return left <= max(1, self.growth // _EARLY_PART) and self.stream.limit < self.capacity

    def _need(self, tokens: int) -> Need:
        return Need(tokens, self.bytes_for(tokens))

    async def _grow(self) -> None:
        tokens = min(self.capacity, self.stream.limit + self.growth)
        if await self.credit.grow(self._need(tokens)):
            await self.sequence.grow(tokens)
            self.counters["decode_grown_total"] += 1
            self._let_go_on(tokens)

    async def _rest(self) -> None:
        """Give the memory back and come back; or stay, if the store does not have all of it."""
        self.stream.paused = True
        await self.settled()
        start = await self._saved()
        if start is None:
            self.credit.stays()
            self._let_go_on(self.stream.limit)
            await asyncio.sleep(_AGAIN_S)
            return
        chain = self._chain()
        self.counters["decode_rested_total"] += 1
        ids = (*chain.blocks, chain.state_id(start))
        async with keep_leased(self.store, ids, owner=self.owner, ttl_s=self.lease_ttl_s):
            await self.sequence.release()
            tokens = min(self.capacity, len(chain.tokens) + self.growth)
            await self.credit.rested(self._need(tokens))
            await self.sequence.reopen(tokens)
            await attach_prompt(
                self.store,
                cut(chain, start),
                self.sequence,
                owner=self.owner,
                lease_ttl_s=self.lease_ttl_s,
                is_there=True,
            )
        await self.store.release(self.owner)
        await replay(self.sequence, chain.tokens[start:], start, self.publisher.note)
        self.counters["decode_replayed_tokens_total"] += len(chain.tokens) - start
        self.stream.sequence = self.sequence.live
        self.credit.ready()
        self._let_go_on(tokens)

    def _let_go_on(self, tokens: int) -> None:
        self.stream.limit, self.stream.paused = tokens, False
        self.wake()

    def _chain(self) -> Chain:
        """All tokens that the sequence has absorbed: the last one drawn is not yet."""
        answer = self.stream.tokens
        absorbed = answer if self.stream.pending is None else answer[:-1]
        return self.base.extend(absorbed)

    async def _saved(self) -> int | None:
        """From where the answer could go on if its memory went now; its objects are leased then."""
        try:
            async with asyncio.timeout(SETTLE_S):
                position = self.stream.sequence.position
                await self.publisher.save(position, await self.sequence.export_state())
                chain = await asyncio.to_thread(self._chain)
                return await resume_point(
                    self.store,
                    chain,
                    first=self.prompt_tokens,
                    owner=self.owner,
                    lease_ttl_s=self.lease_ttl_s,
                )
        except (PenstockError, TimeoutError) as error:
            _log.warning("an answer could not rest: %s", error)
            return None
