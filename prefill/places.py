"""Who holds cache memory: which waiting prompts come in, and which ones rest for them. Pure.

- The order of claims: class (a tenant's class of which nobody has come in for long counts as the
  best), then the tenant that holds least, then first come, first served. Nobody of the same kind
  overtakes the first that does not fit.
- Small prompts (one step's tokens) have an eighth of the memory and a quarter of the slots that
  large ones leave alone, so that a large one never keeps a small one out. Beyond that they queue
  with everybody, so that small ones never keep a large one out.
- Who still finds no room may send others to rest: those of a worse class; a small prompt also large
  ones of its own; and a tenant of whom nobody has come in also one of a tenant who has several in.
  Who rests gives its memory back at a chunk border; the store has all that
  it read, and it comes back to exactly there. Only who got on since it came in may be sent, and
  nobody who is overdue: so whatever comes in gets on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from penstock.request import Priority
from prefill.shares import AGEING_S, Flow, Line


@dataclass(frozen=True)
class Claim:
    """A prompt that waits for memory and a slot, or holds them."""

    line: Line
    size_bytes: int
    got_on: bool = False
    """It has been given tokens since it came in."""
    resting: bool = False
    """It has been sent to rest and still holds its memory."""


@dataclass(frozen=True)
class Room:
    """What a worker has for prompts."""

    capacity_bytes: int
    slots: int
    small_tokens: int
    """A prompt of at most so many tokens is small, if it needs no more than `small_bytes`."""

    @property
    def small_bytes(self) -> int:
        return self.capacity_bytes // 8

    @property
    def small_slots(self) -> int:
        return 0 if self.slots == 1 else max(1, self.slots // 4)

    def is_small(self, claim: Claim) -> bool:
        return claim.line.remaining <= self.small_tokens and claim.size_bytes <= self.small_bytes


@dataclass(frozen=True)
class Moves:
    """Keys, in order."""

    enter: tuple[int, ...] = ()
    rest: tuple[int, ...] = ()


@dataclass
class _Books:
    """What is taken, by kind."""

    room: Room
    size_bytes: int = 0
    count: int = 0
    small_bytes: int = 0
    small_count: int = 0
    large_waits: bool = False
    small_waits: bool = False

    def take(self, claim: Claim) -> None:
        small = self.room.is_small(claim)
        self.size_bytes += claim.size_bytes
        self.count += 1
        self.small_bytes += claim.size_bytes * small
        self.small_count += small

    def fits(self, claim: Claim, freed_bytes: int = 0, freed: int = 0) -> bool:
        """Whether there is room once so much more has been given back (by large ones)."""
        room = self.room
        size_bytes = self.size_bytes - freed_bytes + claim.size_bytes
        count = self.count - freed + 1
        if size_bytes > room.capacity_bytes or count > room.slots:
            return False
        if room.is_small(claim):
            spare = self.small_bytes + claim.size_bytes <= room.small_bytes
            spare = spare and self.small_count < room.small_slots
            return spare or not self.large_waits
        large_count = count - self.small_count
        large_bytes = size_bytes - self.small_bytes
        # A prompt larger than what large ones may have goes alone.
        alone = large_count == 1
        return alone or (
            large_bytes <= room.capacity_bytes - room.small_bytes
            and large_count <= room.slots - room.small_slots
        )

    def waits(self, claim: Claim) -> bool:
        """Somebody of its kind has been turned away already."""
        return self.small_waits if self.room.is_small(claim) else self.large_waits

    def turn_away(self, claim: Claim) -> None:
        if self.room.is_small(claim):
            self.small_waits = True
        else:
            self.large_waits = True


def plan_places(
    waiting: Sequence[Claim],
    holding: Sequence[Claim],
    room: Room,
    *,
    now_s: float,
    ageing_s: float = AGEING_S,
) -> Moves:
    """Who comes in now, and who is to rest so that others can come in later."""
    books = _Books(room)
    for claim in holding:
        books.take(claim)
    enter: list[int] = []
    rest: list[Claim] = []
    held = {_flow(claim) for claim in holding}
    places = Counter(claim.line.tenant for claim in holding)

    def order(claim: Claim) -> tuple[float, ...]:
        line = claim.line
        starved = _flow(claim) not in held and line.overdue(now_s, ageing_s)
        standing = Priority.INTERACTIVE if starved else line.priority
        return standing, places[line.tenant], line.key

    left = list(waiting)
    while left:
        # Anew each time: who has come in counts for its tenant.
        claim = min(left, key=order)
        left.remove(claim)
        if books.waits(claim):
            continue
        if books.fits(claim):
            books.take(claim)
            places[claim.line.tenant] += 1
            enter.append(claim.line.key)
            continue
        rest += _send(claim, holding, rest, books, now_s, ageing_s)
        books.turn_away(claim)
    return Moves(tuple(enter), tuple(claim.line.key for claim in rest))


def _send(
    claim: Claim,
    holding: Sequence[Claim],
    sent: Sequence[Claim],
    books: _Books,
    now_s: float,
    ageing_s: float,
) -> list[Claim]:
    """Who has to rest for `claim` beside those that do already; nobody if that is not enough."""
    on_their_way = [c for c in holding if c.resting] + list(sent)
    freed_bytes = sum(c.size_bytes for c in on_their_way)
    freed = len(on_their_way)
    small = books.room.is_small(claim)

    staying = Counter(c.line.tenant for c in holding if c not in on_their_way)
    alone = not any(c.line.tenant == claim.line.tenant for c in holding)

    def may_be_sent(other: Claim) -> bool:
        if other in on_their_way or not other.got_on or other.line.overdue(now_s, ageing_s):
            return False
        worse = other.line.priority > claim.line.priority
        if books.room.is_small(other):
            return worse and small
        several = alone and staying[other.line.tenant] > 1
        return worse or (other.line.priority == claim.line.priority and (small or several))

    victims = sorted(
        (other for other in holding if may_be_sent(other)),
        key=lambda other: (-other.line.priority, -other.line.remaining, -other.line.key),
    )
    chosen: list[Claim] = []
    while not books.fits(claim, freed_bytes, freed):
        # Once one of a tenant is chosen, it may be that the next one is its last.
        victims = [other for other in victims if may_be_sent(other)]
        if not victims:
            return []
        victim = victims.pop(0)
        chosen.append(victim)
        staying[victim.line.tenant] -= 1
        freed_bytes += victim.size_bytes
        freed += 1
    return chosen


def _flow(claim: Claim) -> Flow:
    return claim.line.tenant, claim.line.priority
