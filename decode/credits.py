"""Credits of a decode worker as a state machine. Pure: every call is told what time it is.

A request holds memory and a slot before any prefill starts for it. Its life here:

    ask -> (in line) -> granted -> used -> ready -> give_back
                            |               |  \\-> grow, again and again
                            v               v
                         expired         resting -> (in line) -> granted -> ready

- The line: class, then the tenant that holds least, then first come, first served. The head is not
  overtaken, so nothing starves behind smaller ones; who has waited for (class + 1) times `ageing_s`
  goes first whatever its class.
- A grant that nobody uses within `ttl_s` returns.
- A request begins with room for its prompt and a part of its answer, and grows. If there is no room
  to grow, those that rank behind it (class, then coming) rest: the store takes their state, their
  memory goes back, and they are in line again, where they stood. Only who is ready and got on since
  it came in may be sent.

Nobody waits for ever: whoever ranks first grows at the cost of all others and ends; whoever waits
to grow waits for those that rank before it, or for those behind it to be ready, which wait for
nobody. `tests/decode/test_credits.py` goes through every state of small cases.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace

from penstock.blocks import BLOCK_TOKENS
from penstock.request import Priority

AGEING_S = 10.0
_LONGEST_RETRY_S = 60.0


@dataclass(frozen=True)
class Need:
    """What a request must hold."""

    tokens: int
    """Context that it has room for."""
    size_bytes: int

    @property
    def pages(self) -> int:
        return -(-self.tokens // BLOCK_TOKENS)


@dataclass(frozen=True)
class Ask:
    """A request for a credit."""

    key: int
    """Unique; smaller came earlier."""
    need: Need
    priority: Priority = Priority.NORMAL
    tenant: bytes = b""
    patience_s: float | None = None
    """It is refused at once if the line is predicted to take longer."""


@dataclass(frozen=True)
class Refusal:
    """No, and why in one word."""

    reason: str
    wait_s: float
    """How long the line is predicted to take."""
    retry_after_s: float


@dataclass(frozen=True)
class _Waiter:
    ask: Ask
    since_s: float
    returns: bool = False
    """It has rested and comes back."""


@dataclass(frozen=True)
class _Holder:
    ask: Ask
    need: Need
    granted_s: float
    used: bool = False
    ready: bool = False
    got_on: bool = False
    resting: bool = False
    wants: Need | None = None

    @property
    def rank(self) -> tuple[int, int]:
        return self.ask.priority, self.ask.key


@dataclass(frozen=True)
class News:
    """What has been decided since it was last asked for; keys."""

    granted: tuple[int, ...] = ()
    grown: tuple[int, ...] = ()
    rest: tuple[int, ...] = ()
    expired: tuple[int, ...] = ()


@dataclass
class Credits:
    """See the module. Every count is zero again when all requests have been given back."""

    capacity_bytes: int
    slots: int
    most_queued: int
    ttl_s: float = float("inf")
    ageing_s: float = AGEING_S
    _line: dict[int, _Waiter] = field(default_factory=dict)
    _held: dict[int, _Holder] = field(default_factory=dict)
    _news: dict[str, list[int]] = field(default_factory=dict)
    _held_s: float = 0.0
    """How long a credit is held, on average of late."""

    @property
    def reserved_bytes(self) -> int:
        return sum(holder.need.size_bytes for holder in self._held.values())

    @property
    def running(self) -> int:
        return len(self._held)

    @property
    def queued(self) -> int:
        return len(self._line)

    @property
    def pages(self) -> int:
        return sum(holder.need.pages for holder in self._held.values())

    @property
    def tokens(self) -> int:
        return sum(holder.need.tokens for holder in self._held.values())

    def need_of(self, key: int) -> Need:
        return self._held[key].need

    def predicted_wait_s(self, ahead: int | None = None) -> float:
        """Until a request with so many in front of it (all, if not told) would be granted."""
        if not self._held:
            return 0.0
        ahead = len(self._line) if ahead is None else ahead
        return (ahead + 1) * self._held_s / len(self._held)

    def take_news(self) -> News:
        news, self._news = self._news, {}
        return News(**{name: tuple(keys) for name, keys in news.items()})

    def ask(self, ask: Ask, now_s: float) -> Refusal | None:
        """In line or granted (see `take_news`), or refused for good."""
        if not self._line and not self._growing and self._fits(ask.need):
            self._grant(_Waiter(ask, now_s), now_s)
            return None
        ahead = sum(waiter.ask.priority <= ask.priority for waiter in self._line.values())
        wait_s = self.predicted_wait_s(ahead)
        retry_s = min(max(1.0, wait_s / 2), _LONGEST_RETRY_S)
        fresh = sum(not waiter.returns for waiter in self._line.values())
        if fresh >= self.most_queued:
            return Refusal("queue_full", wait_s, retry_s)
        if ask.patience_s is not None and wait_s > ask.patience_s:
            retry_s = min(max(1.0, wait_s - ask.patience_s), _LONGEST_RETRY_S)
            return Refusal("predicted_wait", wait_s, retry_s)
        self._line[ask.key] = _Waiter(ask, now_s)
        self._decide(now_s)
        return None

    def use(self, key: int, now_s: float) -> None:
        """Work for it has begun: its grant does not expire any more."""
        self._change(key, now_s, used=True)

    def ready(self, key: int, now_s: float) -> None:
        """It stands at its prompt's end (or where it rested) and could rest."""
        self._change(key, now_s, used=True, ready=True)

    def got_on(self, key: int, now_s: float) -> None:
        """It has drawn tokens since it came in."""
        if not self._held[key].got_on:
            self._change(key, now_s, got_on=True)

    def grow(self, key: int, need: Need, now_s: float) -> None:
        """It wants to hold `need` instead; see `News.grown`."""
        self._change(key, now_s, wants=need)

    def rested(self, key: int, need: Need, now_s: float) -> None:
        """Its memory has gone back; it is in line again, for `need`."""
        holder = self._held.pop(key)
        self._line[key] = _Waiter(replace(holder.ask, need=need), now_s, returns=True)
        self._decide(now_s)

    def stays(self, key: int, now_s: float) -> None:
        """It could not rest after all (the store did not take it); it may be asked again later."""
        self._change(key, now_s, resting=False, got_on=False)

    def give_back(self, key: int, now_s: float) -> None:
        """It has ended, wherever it stood. Again is no error."""
        holder = self._held.pop(key, None)
        if holder is not None and holder.used:
            held_s = now_s - holder.granted_s
            self._held_s = 0.8 * self._held_s + 0.2 * held_s if self._held_s else held_s
        self._line.pop(key, None)
        self._decide(now_s)

    def expire(self, now_s: float) -> None:
        """Grants that nobody used in time return (`News.expired`)."""
        late = [
            k for k, h in self._held.items() if not h.used and now_s - h.granted_s >= self.ttl_s
        ]
        for key in late:
            del self._held[key]
            self._tell("expired", key)
        if late:
            self._decide(now_s)

    @property
    def _growing(self) -> list[_Holder]:
        """Those that wait to grow, in rank order."""
        wanting = (h for h in self._held.values() if h.wants is not None and not h.resting)
        return sorted(wanting, key=lambda holder: holder.rank)

    def _fits(self, need: Need) -> bool:
        room = self.reserved_bytes + need.size_bytes <= self.capacity_bytes
        return room and len(self._held) < self.slots

    def _change(self, key: int, now_s: float, **fields: object) -> None:
        self._held[key] = replace(self._held[key], **fields)  # type: ignore[arg-type]
        self._decide(now_s)

    def _tell(self, name: str, key: int) -> None:
        self._news.setdefault(name, []).append(key)

    def _grant(self, waiter: _Waiter, now_s: float) -> None:
        ask = waiter.ask
        self._held[ask.key] = _Holder(ask, ask.need, now_s, used=waiter.returns)
        self._tell("granted", ask.key)

    def _decide(self, now_s: float) -> None:
        """Growth first, in rank order, then the line, in its own."""
        for holder in self._growing:
            assert holder.wants is not None
            more = holder.wants.size_bytes - holder.need.size_bytes
            if self.reserved_bytes + more > self.capacity_bytes:
                self._send(holder, more)
                return
            self._held[holder.ask.key] = replace(holder, need=holder.wants, wants=None)
            self._tell("grown", holder.ask.key)
        tenants = Counter(holder.ask.tenant for holder in self._held.values())
        while self._line:
            head = min(self._line.values(), key=lambda w: self._turn(w, tenants, now_s))
            if not self._fits(head.ask.need):
                return
            del self._line[head.ask.key]
            tenants[head.ask.tenant] += 1
            self._grant(head, now_s)

    def _turn(
        self, waiter: _Waiter, tenants: Counter[bytes], now_s: float
    ) -> tuple[float, float, int]:
        ask = waiter.ask
        if waiter.returns or now_s - waiter.since_s >= (ask.priority + 1) * self.ageing_s:
            return (-1, 0, ask.key)
        return (ask.priority, tenants[ask.tenant], ask.key)

    def _send(self, grower: _Holder, more_bytes: int) -> None:
        """To rest: as many of those behind `grower` as it takes, the last first; or nobody."""
        behind = [holder for holder in self._held.values() if holder.rank > grower.rank]
        lacking = self.reserved_bytes + more_bytes - self.capacity_bytes
        lacking -= sum(holder.need.size_bytes for holder in behind if holder.resting)
        chosen = []
        for holder in sorted(behind, key=lambda holder: holder.rank, reverse=True):
            if lacking <= 0:
                break
            # Who waits to grow cannot get on by itself.
            stands = holder.got_on or holder.wants is not None
            if holder.ready and stands and not holder.resting:
                chosen.append(holder)
                lacking -= holder.need.size_bytes
        if lacking > 0:
            return
        for holder in chosen:
            self._held[holder.ask.key] = replace(holder, resting=True, wants=None)
            self._tell("rest", holder.ask.key)
