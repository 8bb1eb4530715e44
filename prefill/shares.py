"""Which prompts get how many tokens of the next step. Pure: no clock, no event loop, no engine.

Three rules, in this order:
- Express: a prompt that fits into one step, in the best class that is present, is not cut up. So it
  waits for the step under way and is in the next one, whatever else there is to read. Its tenant
  may be ahead of the others by one step's tokens at most, else it queues as below.
- Between tenants: the better class first; in a class the next quantum goes to the tenant that has
  been served least (virtual time, counted in tokens). A tenant gains nothing by sending more, nor
  by having been idle. A tenant's class that got nothing for (class + 1) times `ageing_s` has one
  quantum before anybody else.
- Within a tenant's class: the shortest. Who got nothing for so long goes before the others, the
  longest waiting first; while there is such a one, express may take half of a step at most.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from penstock.blocks import BLOCK_TOKENS
from penstock.request import Priority

QUANTUM_TOKENS = BLOCK_TOKENS
AGEING_S = 10.0


@dataclass(frozen=True)
class Line:
    """One prompt that could be read on."""

    key: int
    """Unique; smaller came earlier."""
    tenant: bytes
    priority: Priority
    remaining: int
    """Tokens yet to be read, at least 1."""
    since_s: float
    """When it was last given tokens; before that, when it came."""

    def overdue(self, now_s: float, ageing_s: float) -> bool:
        return now_s - self.since_s >= (self.priority + 1) * ageing_s


Flow = tuple[bytes, Priority]
"""A tenant's prompts of one class."""


@dataclass
class Shares:
    """How much each tenant has been served, as virtual time in tokens. A tenant's entry goes when
    the others have caught up with it.
    """

    _served: dict[bytes, float] = field(default_factory=dict)
    _floor: float = 0.0
    _served_at: dict[Flow, float] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self._served)

    def of(self, tenant: bytes) -> float:
        return max(self._served.get(tenant, 0.0), self._floor)

    def charge(self, flow: Flow, tokens: int, *, backlogged: Iterable[Flow], now_s: float) -> None:
        """`flow` was given so many. `backlogged`: who has something to read now."""
        tenant = flow[0]
        self._served[tenant] = self.of(tenant) + tokens
        flows = set(backlogged)
        self._served_at[flow] = now_s
        self._served_at = {f: at for f, at in self._served_at.items() if f in flows}
        waiting = {each for each, _ in flows}
        if not waiting:
            # Nobody was kept waiting, so nobody is owed anything.
            self._served.clear()
            return
        # The least served of those that wait is the present; who is behind it has been idle.
        self._floor = max(self._floor, min(self.of(each) for each in waiting))
        self._served = {t: v for t, v in self._served.items() if v > self._floor or t in waiting}

    def view(self, tenants: Iterable[bytes]) -> Served:
        """As it is among these tenants."""
        served = {tenant: self.of(tenant) for tenant in tenants}
        least = min(served.values(), default=0.0)
        leads = {tenant: value - least for tenant, value in served.items()}
        return Served(leads, dict(self._served_at))


@dataclass(frozen=True)
class Served:
    """What tenants have had so far."""

    leads: Mapping[bytes, float] = field(default_factory=dict)
    """By how many tokens each is ahead of the least served of them."""
    at_s: Mapping[Flow, float] = field(default_factory=dict)
    """When each flow was last given tokens."""


@dataclass(frozen=True)
class Grant:
    """Tokens of the next step for one prompt."""

    key: int
    tokens: int


def plan_step(
    lines: Sequence[Line],
    served: Served,
    *,
    budget: int,
    now_s: float,
    ageing_s: float = AGEING_S,
) -> tuple[Grant, ...]:
    """At most `budget` tokens in all, every one of them if there is as much to read.

    One grant a prompt, in the order in which they were decided.
    """
    if budget < 1:
        raise ValueError(f"a step needs a budget of at least 1 token, not {budget}")
    given: dict[int, int] = {}
    ahead = {line.tenant: served.leads.get(line.tenant, 0.0) for line in lines}
    left = budget

    def give(line: Line, tokens: int) -> None:
        nonlocal left
        given[line.key] = given.get(line.key, 0) + tokens
        ahead[line.tenant] += tokens
        left -= tokens

    late = any(line.overdue(now_s, ageing_s) for line in lines)
    reserve = budget // 2 if late else 0
    best = min((line.priority for line in lines), default=Priority.NORMAL)
    for line in sorted(lines, key=lambda line: line.key):
        short = line.remaining <= left - reserve
        if short and line.priority == best and ahead[line.tenant] <= budget:
            give(line, line.remaining)
    starved = {
        flow
        for flow, since_s in _since(lines, served).items()
        if flow[1] > best and now_s - since_s >= (flow[1] + 1) * ageing_s
    }
    while left:
        unread = [line for line in lines if given.get(line.key, 0) < line.remaining]
        if not unread:
            break
        queues = _queues(unread, now_s, ageing_s)
        # A round: whoever is overdue gets one quantum in it.
        while left and queues:
            flow = min(queues, key=lambda f: (f not in starved, f[1], ahead[f[0]], f[0]))
            starved.discard(flow)
            line = queues[flow][-1]
            give(line, min(QUANTUM_TOKENS, line.remaining - given.get(line.key, 0), left))
            if line.overdue(now_s, ageing_s) or given[line.key] == line.remaining:
                queues[flow].pop()
                if not queues[flow]:
                    del queues[flow]
    return tuple(Grant(key, tokens) for key, tokens in given.items())


def _since(lines: Iterable[Line], served: Served) -> dict[Flow, float]:
    """From when on each flow has been given nothing."""
    since: dict[Flow, float] = {}
    for line in lines:
        flow = line.tenant, line.priority
        since[flow] = min(since.get(flow, line.since_s), line.since_s)
    return {flow: max(at, served.at_s.get(flow, at)) for flow, at in since.items()}


def _queues(lines: Iterable[Line], now_s: float, ageing_s: float) -> dict[Flow, list[Line]]:
    """By flow; the next one is at the end."""
    queues: dict[Flow, list[Line]] = {}
    for line in lines:
        queues.setdefault((line.tenant, line.priority), []).append(line)
    for queue in queues.values():
        queue.sort(key=lambda line: _turn(line, now_s, ageing_s), reverse=True)
    return queues


def _turn(line: Line, now_s: float, ageing_s: float) -> tuple[float, ...]:
    """Order within a flow."""
    if line.overdue(now_s, ageing_s):
        return (0, line.since_s, line.key)
    return (1, line.remaining, line.key)


def tokens_ahead(
    lines: Iterable[Line], *, tenant: bytes, priority: Priority, tokens: int, budget: int
) -> int:
    """What is read before the last of `tokens` new ones, about: the step under way, the tenant's
    own that go first, and of every other tenant no more than as much (they share alike).
    """
    mine, others = tokens, dict[bytes, int]()
    busy = False
    for line in lines:
        busy = True
        if line.priority > priority:
            continue
        if line.tenant != tenant:
            others[line.tenant] = others.get(line.tenant, 0) + line.remaining
        elif line.priority < priority or line.remaining <= tokens:
            mine += line.remaining
    under_way = budget if busy else 0
    return under_way + mine - tokens + sum(min(backlog, mine) for backlog in others.values())
