"""Credits: never more than there is, and no two requests can wait for each other.

The second is shown twice: every reachable state of small cases is gone through (a model check of
the very code that the worker runs), and random large cases are driven by hypothesis.
"""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from decode.credits import AGEING_S, Ask, Credits, Need, Refusal
from penstock.request import Priority


@dataclass
class Job:
    """One request of the model: begins with `begin` units, draws until it has `most`."""

    key: int
    begin: int
    most: int
    priority: Priority
    where: str = "new"
    """new | line | granted | prefill | ready | wants | resting | ended"""
    at: int = 0
    """Units filled; the prompt fills one."""
    room: int = 0


@dataclass
class World:
    """Decode credits, bytes of the store and one place in prefill, with some requests."""

    credits: Credits
    jobs: list[Job]
    store_units: int
    prefill_slots: int = 1
    log: list[str] = field(default_factory=list)

    def need(self, units: int) -> Need:
        return Need(units * 256, units)

    def hear(self) -> None:
        news = self.credits.take_news()
        for key in news.granted:
            job = self.jobs[key]
            returns = job.at > 1
            job.where, job.room = (
                ("prefill?" if not returns else "attach"),
                self.credits.need_of(key).size_bytes,
            )
            if not returns and not self.reserve_store(job):
                # Refused, never made to wait: whoever waits for the store holds nothing.
                job.where = "ended"
                self.credits.give_back(key, 0.0)
                self.hear()
        for key in news.grown:
            self.jobs[key].where, self.jobs[key].room = (
                "ready",
                self.credits.need_of(key).size_bytes,
            )
        for key in news.rest:
            self.jobs[key].where = "resting"
        for key in news.expired:
            self.jobs[key].where = "ended"

    def reserve_store(self, job: Job) -> bool:
        taken = sum(
            other.most
            for other in self.jobs
            if other is not job and other.where not in ("new", "line", "ended")
        )
        return taken + job.most <= self.store_units

    def moves(self) -> list[tuple[str, int]]:
        """What can happen by itself: no client and no clock is needed for it."""
        found = []
        reading = sum(job.where == "prefill" for job in self.jobs)
        for job in self.jobs:
            if job.where == "prefill?" and reading < self.prefill_slots:
                found.append(("prefill", job.key))
            if job.where in ("prefill", "attach", "resting"):
                found.append((job.where, job.key))
            if job.where == "ready":
                found.append(("draw", job.key))
        return found

    def move(self, name: str, key: int) -> None:
        job, credits = self.jobs[key], self.credits
        match name:
            case "ask":
                job.where = "line"
                ask = Ask(key, self.need(job.begin), job.priority)
                if isinstance(credits.ask(ask, 0.0), Refusal):
                    job.where = "ended"
            case "prefill" if job.where == "prefill?":
                job.where = "prefill"
                credits.use(key, 0.0)
            case "prefill" | "attach":
                job.where, job.at = "ready", max(job.at, 1)
                credits.ready(key, 0.0)
            case "draw":
                if job.at == job.most:
                    job.where = "ended"
                    credits.give_back(key, 0.0)
                elif job.at == job.room:
                    job.where = "wants"
                    credits.grow(key, self.need(job.room + 1), 0.0)
                else:
                    job.at += 1
                    credits.got_on(key, 0.0)
            case "resting":
                job.where = "line"
                credits.rested(key, self.need(min(job.most, job.at + 1)), 0.0)
            case "cancel":
                job.where = "ended"
                credits.give_back(key, 0.0)
            case "expire":
                credits.ttl_s = 0.0
                credits.expire(0.0)
                credits.ttl_s = float("inf")
        self.hear()
        held = sum(j.room for j in self.jobs if j.where not in ("new", "line", "ended"))
        assert credits.reserved_bytes == held <= credits.capacity_bytes
        assert credits.running <= credits.slots

    @property
    def state(self) -> tuple[object, ...]:
        return tuple((job.where, job.at, job.room) for job in self.jobs)


def check_all(world: World, *, cancels: bool) -> int:
    """Every reachable state; from each, whatever happens by itself ends with all having ended.

    Proved by depth-first search: the moves that happen by themselves form no circle, and where none
    is left nobody is waiting any more.
    """
    final: dict[object, bool] = {}
    seen: set[object] = set()

    def settles(world: World, path: tuple[object, ...]) -> None:
        state = world.state
        if state in final:
            return
        assert state not in path, f"it goes round in circles: {state}"
        moves = world.moves()
        if not moves:
            left = [job for job in world.jobs if job.where not in ("new", "ended")]
            assert not left, f"they wait for each other: {left}"
        for name, key in moves:
            after = copy.deepcopy(world)
            after.move(name, key)
            settles(after, (*path, state))
        final[state] = True

    stack = [world]
    while stack:
        world = stack.pop()
        if world.state in seen:
            continue
        seen.add(world.state)
        settles(world, ())
        steps = list(world.moves())
        steps += [("ask", job.key) for job in world.jobs if job.where == "new"]
        if cancels:
            steps += [
                ("cancel", job.key) for job in world.jobs if job.where not in ("new", "ended")
            ]
            steps += [("expire", j.key) for j in world.jobs if j.where == "prefill?"]
        for name, key in steps:
            after = copy.deepcopy(world)
            after.move(name, key)
            stack.append(after)
    return len(seen)


N, B = Priority.NORMAL, Priority.BATCH
CASES = [
    # capacity, slots, units of the store, (begin, most, class)
    (4, 3, 99, [(1, 4, N), (1, 4, N), (1, 4, N)]),
    (4, 2, 99, [(2, 4, N), (1, 4, B), (1, 2, N)]),
    (3, 3, 6, [(1, 3, B), (1, 3, N), (2, 3, N)]),
    (5, 3, 99, [(2, 5, B), (2, 5, B), (1, 5, N)]),
]


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
@pytest.mark.parametrize("cancels", [False, True], ids=["undisturbed", "with cancels"])
def test_no_two_requests_can_wait_for_each_other(
    case: tuple[int, int, int, list[tuple[int, int, Priority]]], cancels: bool
) -> None:
    capacity, slots, store_units, jobs = case
    world = World(
        Credits(capacity, slots, most_queued=9),
        [Job(key, *job) for key, job in enumerate(jobs)],
        store_units,
    )
    states = check_all(world, cancels=cancels)
    print(f"{states} states, each of which ends with every request having ended")
    assert states > 100


CAPACITY, SLOTS, LINE = 40, 5, 6


class Machine(RuleBasedStateMachine):
    """Random requests, growth, rests, cancels and time."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self.credits = Credits(CAPACITY, SLOTS, LINE, ttl_s=30.0)
        self.keys = itertools.count()
        self.line: set[int] = set()
        self.held: dict[int, int] = {}
        self.most: dict[int, int] = {}
        self.unused: dict[int, float] = {}
        self.wants: dict[int, int] = {}
        self.resting: set[int] = set()

    def hear(self) -> None:
        news = self.credits.take_news()
        for key in news.granted:
            assert key in self.line
            self.line.remove(key)
            self.held[key] = self.credits.need_of(key).size_bytes
            self.unused[key] = self.now_s
        for key in news.grown:
            self.held[key] = self.wants.pop(key)
        for key in news.rest:
            assert key in self.held and key not in self.unused
            self.resting.add(key)
            self.wants.pop(key, None)
        for key in news.expired:
            assert self.now_s - self.unused.pop(key) >= 30.0
            del self.held[key]

    @rule(
        begin=st.integers(1, 12),
        more=st.integers(0, 28),
        priority=st.sampled_from(list(Priority)),
        tenant=st.sampled_from([b"a", b"b"]),
        patience_s=st.sampled_from([None, 0.0, 5.0]),
    )
    def ask(
        self, begin: int, more: int, priority: Priority, tenant: bytes, patience_s: float | None
    ) -> None:
        key = next(self.keys)
        before = len(self.line)
        ask = Ask(key, Need(begin * 256, begin), priority, tenant, patience_s)
        refusal = self.credits.ask(ask, self.now_s)
        if refusal is not None:
            assert refusal.retry_after_s >= 1.0
            assert refusal.reason in ("queue_full", "predicted_wait")
            if refusal.reason == "queue_full":
                assert before >= LINE
            else:
                assert patience_s is not None and refusal.wait_s > patience_s
            return
        self.line.add(key)
        self.most[key] = begin + more
        self.hear()

    @precondition(lambda self: self.unused)
    @rule(data=st.data())
    def ready(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.unused)))
        del self.unused[key]
        self.credits.ready(key, self.now_s)
        self.credits.got_on(key, self.now_s)
        self.hear()

    def growable(self) -> list[int]:
        return [
            key
            for key, size in self.held.items()
            if key not in self.unused
            and key not in self.wants
            and key not in self.resting
            and size < self.most[key]
        ]

    @precondition(lambda self: self.growable())
    @rule(data=st.data(), more=st.integers(1, 10))
    def grow(self, data: st.DataObject, more: int) -> None:
        key = data.draw(st.sampled_from(sorted(self.growable())))
        size = min(self.held[key] + more, self.most[key])
        self.wants[key] = size
        self.credits.grow(key, Need(size * 256, size), self.now_s)
        self.hear()

    @precondition(lambda self: self.resting)
    @rule(data=st.data(), works=st.booleans())
    def rest(self, data: st.DataObject, works: bool) -> None:
        key = data.draw(st.sampled_from(sorted(self.resting)))
        self.resting.remove(key)
        if works:
            size = self.held.pop(key)
            self.line.add(key)
            self.credits.rested(key, Need(size * 256, size), self.now_s)
        else:
            self.credits.stays(key, self.now_s)
        self.hear()

    @precondition(lambda self: self.line or self.held)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted({*self.line, *self.held})))
        for books in (self.held, self.unused, self.wants):
            books.pop(key, None)  # type: ignore[attr-defined]
        self.line.discard(key)
        self.resting.discard(key)
        self.credits.give_back(key, self.now_s)
        self.hear()

    @rule(seconds=st.sampled_from([0.5, 31.0]))
    def wait(self, seconds: float) -> None:
        self.now_s += seconds
        self.credits.expire(self.now_s)
        self.hear()

    @invariant()
    def the_books_agree_and_nothing_is_promised_twice(self) -> None:
        credits = self.credits
        assert credits.reserved_bytes == sum(self.held.values()) <= CAPACITY
        assert credits.running == len(self.held) <= SLOTS
        assert credits.queued == len(self.line)
        assert credits.pages == sum(self.held.values())

    @invariant()
    def an_empty_worker_keeps_nobody_waiting(self) -> None:
        assert self.held or not self.line

    def teardown(self) -> None:
        """Once nobody comes any more, everybody ends."""
        for _ in range(2000):
            for key in list(self.resting):
                self.resting.discard(key)
                size = self.held.pop(key)
                self.line.add(key)
                self.credits.rested(key, Need(size * 256, size), self.now_s)
                self.hear()
            for key in sorted(self.held):
                if key in self.resting or key in self.wants or key not in self.held:
                    continue
                if key in self.unused:
                    del self.unused[key]
                    self.credits.ready(key, self.now_s)
                    self.credits.got_on(key, self.now_s)
                elif self.held[key] < self.most[key]:
                    self.wants[key] = self.most[key]
                    self.credits.grow(key, Need(256 * self.most[key], self.most[key]), self.now_s)
                else:
                    del self.held[key]
                    self.credits.give_back(key, self.now_s)
                self.hear()
            if not self.held and not self.line:
                break
        assert not self.held and not self.line, "somebody waits for ever"
        assert self.credits.reserved_bytes == self.credits.running == self.credits.queued == 0


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def ask(key: int, size: int, priority: Priority = N, tenant: bytes = b"a") -> Ask:
    return Ask(key, Need(size * 256, size), priority, tenant)


def test_the_line_goes_by_class_tenant_and_coming_and_age_beats_them_all() -> None:
    credits = Credits(10, 1, 9)
    credits.ask(ask(0, 1), 0.0)
    credits.ask(ask(1, 1, B), 0.0)
    credits.ask(ask(2, 1), 1.0)
    credits.ask(ask(3, 1, Priority.INTERACTIVE), 2.0)
    assert credits.take_news().granted == (0,)
    order = []
    for key in (0, 3, 2):
        credits.give_back(key, 3.0)
        order += credits.take_news().granted
    assert order == [3, 2, 1]
    credits.ask(ask(4, 1, B), 3.0)
    credits.ask(ask(5, 1, Priority.INTERACTIVE), 3.0 + 3 * AGEING_S)
    credits.give_back(1, 3.0 + 3 * AGEING_S)
    assert credits.take_news().granted == (4,), "it had waited long enough"


def test_a_tenant_with_many_requests_does_not_keep_another_out() -> None:
    credits = Credits(10, 2, 50)
    for key in range(20):
        credits.ask(ask(key, 1, tenant=b"much"), 0.0)
    credits.ask(ask(20, 1, tenant=b"little"), 0.0)
    credits.take_news()
    credits.give_back(0, 1.0)
    assert credits.take_news().granted == (20,)


def test_who_waits_for_room_to_grow_sends_the_last_one_to_rest_and_it_comes_back() -> None:
    credits = Credits(10, 5, 9)
    for key, size in enumerate((4, 3, 3)):
        credits.ask(ask(key, size), 0.0)
        credits.ready(key, 0.0)
        credits.got_on(key, 0.0)
    credits.ask(ask(3, 1), 0.0)
    credits.take_news()
    credits.grow(0, Need(6 * 256, 6), 1.0)
    assert credits.take_news().rest == (2,)
    credits.rested(2, Need(3 * 256, 3), 2.0)
    news = credits.take_news()
    assert news.grown == (0,)
    # One unit is free, but who rested goes first and needs three.
    assert news.granted == () and credits.queued == 2
    credits.give_back(1, 3.0)
    assert credits.take_news().granted == (2, 3)


def test_a_prediction_is_what_the_line_then_takes() -> None:
    """Four slots, each credit held for two seconds, a new request every half second."""
    credits = Credits(100, 4, 100)
    for key in range(4):
        credits.ask(ask(key, 1), key * 0.5)
        credits.use(key, key * 0.5)
    for key in range(4):
        credits.give_back(key, 2.0 + key * 0.5)
        credits.ask(ask(10 + key, 1), 2.0 + key * 0.5)
        credits.use(10 + key, 2.0 + key * 0.5)
    assert credits.predicted_wait_s(0) == pytest.approx(0.5)
    for key in range(6):
        credits.ask(ask(20 + key, 1), 4.0)
    assert credits.predicted_wait_s() == pytest.approx(3.5)
