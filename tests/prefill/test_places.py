"""Who holds memory: never more than there is, small prompts soon, nobody for ever outside."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from penstock.request import Priority
from prefill.places import Claim, Moves, Room, plan_places
from prefill.shares import AGEING_S, Line

CAPACITY = 800
ROOM = Room(CAPACITY, slots=8, small_tokens=100)
PRIORITIES = st.sampled_from(list(Priority))


class Places(RuleBasedStateMachine):
    """Random arrivals, progress and ends; a token takes a byte."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self.waiting: dict[int, Claim] = {}
        self.holding: dict[int, Claim] = {}
        self.came = 0

    def plan(self) -> Moves:
        moves = plan_places(
            list(self.waiting.values()), list(self.holding.values()), ROOM, now_s=self.now_s
        )
        for key in moves.enter:
            self.holding[key] = replace(self.waiting.pop(key), got_on=False)
        for key in moves.rest:
            self.holding[key] = replace(self.holding[key], resting=True)
        return moves

    @rule(
        tokens=st.one_of(st.integers(1, 100), st.integers(1, CAPACITY)),
        priority=PRIORITIES,
        tenant=st.sampled_from([b"a", b"b"]),
    )
    def come(self, tokens: int, priority: Priority, tenant: bytes) -> None:
        line = Line(self.came, tenant, priority, tokens, self.now_s)
        self.waiting[self.came] = Claim(line, tokens)
        self.came += 1
        self.plan()

    @rule(seconds=st.sampled_from([1.0, 15.0, 40.0]))
    def wait(self, seconds: float) -> None:
        self.now_s += seconds
        self.plan()

    @precondition(lambda self: self.holding)
    @rule(data=st.data(), ends=st.booleans())
    def get_on(self, data: st.DataObject, ends: bool) -> None:
        key = data.draw(st.sampled_from(sorted(self.holding)))
        claim = self.holding[key]
        if claim.resting or ends:
            del self.holding[key]
            if claim.resting and not ends:
                self.waiting[key] = replace(claim, resting=False, got_on=False)
        else:
            line = replace(claim.line, since_s=self.now_s)
            self.holding[key] = replace(claim, line=line, got_on=True)
        self.plan()

    @invariant()
    def never_more_than_there_is(self) -> None:
        assert sum(claim.size_bytes for claim in self.holding.values()) <= CAPACITY
        assert len(self.holding) <= ROOM.slots

    @invariant()
    def an_idle_worker_keeps_nobody_waiting(self) -> None:
        assert self.holding or not self.waiting

    def teardown(self) -> None:
        """Once nobody comes any more all get in and through."""
        for _ in range(20 * (self.came + 1)):
            self.now_s += 1.0
            self.plan()
            for key, claim in list(self.holding.items()):
                del self.holding[key]
                if claim.resting:
                    self.waiting[key] = replace(claim, resting=False, got_on=False)
        assert not self.waiting


TestPlaces = Places.TestCase
TestPlaces.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def claim(
    key: int, tokens: int, priority: Priority = Priority.NORMAL, *, since_s: float = 0.0
) -> Claim:
    return Claim(Line(key, b"a", priority, tokens, since_s), tokens, got_on=True)


@given(st.lists(st.integers(200, CAPACITY), min_size=1, max_size=8), PRIORITIES)
def test_large_prompts_leave_room_for_small_ones_or_rest_for_them(
    sizes: list[int], priority: Priority
) -> None:
    waiting = [claim(key, size, priority) for key, size in enumerate(sizes)]
    first = plan_places(waiting, [], ROOM, now_s=0.0)
    holding = [c for c in waiting if c.line.key in first.enter]
    small = claim(99, 80, priority)
    moves = plan_places([small, *waiting[len(holding) :]], holding, ROOM, now_s=1.0)
    if 99 not in moves.enter:
        assert moves.rest, "a small prompt waits for a large one's end"
        (alone,) = holding
        assert alone.size_bytes > CAPACITY - ROOM.small_bytes
        back = plan_places([small], [], ROOM, now_s=2.0)
        assert back.enter == (99,)


def test_a_better_class_sends_a_worse_one_to_rest_and_not_the_other_way_round() -> None:
    batch = claim(1, 700, Priority.BATCH)
    moves = plan_places([claim(2, 600)], [batch], ROOM, now_s=1.0)
    assert moves == Moves(rest=(1,))
    again = plan_places([claim(2, 600)], [replace(batch, resting=True)], ROOM, now_s=1.0)
    assert again == Moves(), "once is enough"
    back = plan_places([batch], [claim(2, 600)], ROOM, now_s=1.0)
    assert back == Moves()


def test_who_has_not_got_on_or_is_overdue_is_not_sent_to_rest() -> None:
    fresh = replace(claim(1, 700, Priority.BATCH), got_on=False)
    assert plan_places([claim(2, 600)], [fresh], ROOM, now_s=1.0) == Moves()
    late = claim(1, 700, Priority.BATCH, since_s=0.0)
    now_s = 3 * AGEING_S
    waiting = claim(2, 600, since_s=now_s)
    assert plan_places([waiting], [late], ROOM, now_s=now_s) == Moves()


def test_places_go_to_the_tenant_that_holds_least() -> None:
    waiting = [claim(key, 110) for key in range(9)]
    waiting.append(Claim(Line(9, b"b", Priority.NORMAL, 110, 0.0), 110))
    assert plan_places(waiting, [], ROOM, now_s=0.0).enter[:3] == (0, 9, 1)


def test_small_ones_do_not_keep_a_large_one_out_for_ever() -> None:
    """An endless flood of small prompts, of which each stays for three rounds."""
    holding: dict[int, int] = {}
    waiting = {n: claim(n, 100) for n in range(8)}
    came, large = 8, -1
    entered_after = None
    for round_ in range(60):
        if round_ == 5:
            large, came = came, came + 1
            waiting[large] = claim(large, 600)
        moves = plan_places(
            list(waiting.values()),
            [claim(key, 600 if key == large else 100) for key in holding],
            ROOM,
            now_s=0.0,
        )
        for key in moves.enter:
            holding[key] = 3
            del waiting[key]
        if large in holding:
            entered_after = round_ - 5
            break
        holding = {key: left - 1 for key, left in holding.items() if left > 1}
        for _ in range(4):
            waiting[came] = claim(came, 100)
            came += 1
    print(f"the large prompt came in after {entered_after} rounds beside {came} small ones")
    assert entered_after is not None and entered_after <= 30


def test_a_tenant_that_fills_the_worker_makes_room_for_another_one_s_first() -> None:
    much = [claim(key, 200) for key in range(3)]
    other = Claim(Line(9, b"b", Priority.NORMAL, 300, 0.0), 300)
    moves = plan_places([other], much, ROOM, now_s=1.0)
    assert moves.rest and len(moves.rest) < 3
    second = Claim(Line(10, b"b", Priority.NORMAL, 700, 0.0), 700)
    held = [claim(1, 200), Claim(other.line, 300, got_on=True)]
    assert plan_places([second], held, ROOM, now_s=1.0) == Moves(), "each has one"
