"""The plan of a step: all of the budget, nobody starves, tenants share alike, short ones soon."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.request import Priority
from prefill.shares import (
    AGEING_S,
    QUANTUM_TOKENS,
    Grant,
    Line,
    Served,
    Shares,
    plan_step,
    tokens_ahead,
)

BUDGET = 2048
PRIORITIES = st.sampled_from(list(Priority))
LINES = st.lists(
    st.builds(
        Line,
        key=st.integers(0, 10**6),
        tenant=st.sampled_from([b"a", b"b", b"c"]),
        priority=PRIORITIES,
        remaining=st.one_of(st.integers(1, 3000), st.integers(1, 10**6)),
        since_s=st.floats(0, 100),
    ),
    max_size=12,
    unique_by=lambda line: line.key,
)


@dataclass
class Worker:
    """Steps of one second each, in virtual time, with the plans of the real worker."""

    budget: int = BUDGET
    now_s: float = 0.0
    lines: dict[int, Line] = field(default_factory=dict)
    shares: Shares = field(default_factory=Shares)
    served: dict[bytes, int] = field(default_factory=dict)
    waits: dict[int, float] = field(default_factory=dict)
    """The longest time that each line went without tokens."""
    ended: dict[int, float] = field(default_factory=dict)

    def come(self, tokens: int, tenant: bytes = b"a", priority: Priority = Priority.NORMAL) -> int:
        key = len(self.lines) + len(self.ended)
        self.lines[key] = Line(key, tenant, priority, tokens, self.now_s)
        return key

    def step(self) -> tuple[Grant, ...]:
        tenants = {line.tenant for line in self.lines.values()}
        plan = plan_step(
            list(self.lines.values()),
            self.shares.view(tenants),
            budget=self.budget,
            now_s=self.now_s,
        )
        self.now_s += 1.0
        for grant in plan:
            line = self.lines[grant.key]
            waited = self.now_s - line.since_s
            self.waits[grant.key] = max(self.waits.get(grant.key, 0.0), waited)
            self.served[line.tenant] = self.served.get(line.tenant, 0) + grant.tokens
            if line.remaining == grant.tokens:
                del self.lines[grant.key]
                self.ended[grant.key] = self.now_s
            else:
                left = line.remaining - grant.tokens
                self.lines[grant.key] = replace(line, remaining=left, since_s=self.now_s)
            waiting = {(each.tenant, each.priority) for each in self.lines.values()}
            flow = line.tenant, line.priority
            self.shares.charge(flow, grant.tokens, backlogged=waiting, now_s=self.now_s)
        return plan


@given(LINES, st.integers(1, 5000), st.floats(100, 200))
def test_a_step_gives_all_of_its_budget_and_to_nobody_more_than_he_has_left(
    lines: list[Line], budget: int, now_s: float
) -> None:
    plan = plan_step(lines, Served(), budget=budget, now_s=now_s)
    left = {line.key: line.remaining for line in lines}
    assert len({grant.key for grant in plan}) == len(plan)
    assert all(0 < grant.tokens <= left[grant.key] for grant in plan)
    assert sum(grant.tokens for grant in plan) == min(budget, sum(left.values()))


@given(st.integers(1, 8), st.integers(1, 4), st.integers(0, 12), st.integers(1, BUDGET // 2))
def test_a_short_prompt_is_in_the_next_step_whatever_is_read_beside_it(
    streams: int, tenants: int, warm_up: int, tokens: int
) -> None:
    worker = Worker()
    for stream in range(streams):
        worker.come(10**6, tenant=bytes([stream % tenants]))
    for _ in range(warm_up):
        worker.step()
    key = worker.come(tokens, tenant=bytes([tenants - 1]))
    worker.step()
    assert key in worker.ended, "it had to wait for more than the step under way"


@given(st.lists(st.integers(300, 4000), min_size=1, max_size=6), st.integers(10, 60))
def test_two_backlogged_tenants_get_the_same_though_one_sends_ten_times_as_much(
    sizes: list[int], steps: int
) -> None:
    worker = Worker()
    for _ in range(steps):
        for tenant, prompts in ((b"much", 20), (b"little", 2)):
            # Both always have more than a step to read.
            waiting = [line.remaining for line in worker.lines.values() if line.tenant == tenant]
            while len(waiting) < prompts or sum(waiting) < 2 * BUDGET:
                worker.come(sizes[len(waiting) % len(sizes)], tenant=tenant)
                waiting.append(sizes[len(waiting) % len(sizes)])
        worker.step()
    much, little = worker.served[b"much"], worker.served[b"little"]
    assert abs(much - little) <= 2 * BUDGET


@given(st.integers(2, 5), st.integers(4, 40))
def test_tenants_with_endless_work_differ_by_less_than_a_step(tenants: int, steps: int) -> None:
    worker = Worker()
    for tenant in range(tenants):
        for _ in range(1 if tenant else 10):
            worker.come(10**7, tenant=bytes([tenant]))
    for _ in range(steps):
        worker.step()
    shares = [worker.served.get(bytes([tenant]), 0) for tenant in range(tenants)]
    assert max(shares) - min(shares) <= QUANTUM_TOKENS


@settings(max_examples=25, deadline=None)
@given(st.lists(PRIORITIES, min_size=1, max_size=4), st.integers(1, 3), PRIORITIES)
def test_nobody_starves_beside_a_flood_of_better_and_shorter_prompts(
    classes: list[Priority], tenants: int, flood: Priority
) -> None:
    worker = Worker()
    keys = [
        worker.come(10**7, tenant=bytes([n % tenants]), priority=priority)
        for n, priority in enumerate(classes)
    ]
    longest = 30
    for second in range(300):
        for tenant in range(tenants):
            if len(worker.lines) < longest:
                worker.come(900, tenant=bytes([tenant]), priority=flood)
                worker.come(5000 + second, tenant=bytes([tenant]), priority=flood)
        worker.step()
    for key in keys:
        line = worker.lines[key]
        # It becomes overdue; then those that did before it have one quantum each, one a period if
        # their whole class is kept waiting by a better one.
        kept_waiting = min([*classes, flood]) < line.priority
        others = classes.count(line.priority) if kept_waiting else 1
        others += longest if kept_waiting and flood == line.priority else 0
        bound = (line.priority + 1) * AGEING_S * others + longest + 2
        waited = max(worker.waits.get(key, 0.0), worker.now_s - line.since_s)
        assert waited <= bound, f"{line.priority.name} waited {waited} s"


@given(st.integers(1, 6))
def test_a_better_class_goes_first_until_the_others_are_overdue(steps: int) -> None:
    worker = Worker()
    batch = worker.come(10**6, priority=Priority.BATCH)
    normal = worker.come(10**6, priority=Priority.NORMAL)
    soon = worker.come(10**6, priority=Priority.INTERACTIVE)
    for _ in range(steps):
        (grant,) = worker.step()
        assert grant.key == soon
    del worker.lines[soon]
    assert worker.step()[0].key == normal
    del worker.lines[normal]
    assert worker.step()[0].key == batch


def test_a_tenant_of_many_short_prompts_cannot_use_the_express_for_more_than_its_share() -> None:
    worker = Worker()
    worker.come(10**8, tenant=b"long")
    for _ in range(100):
        for _ in range(4):
            worker.come(1000, tenant=b"short")
        worker.step()
    difference = worker.served[b"short"] - worker.served[b"long"]
    print(f"of {100 * BUDGET} tokens the tenant of short prompts had {difference} more")
    assert abs(difference) <= 2 * BUDGET


def test_the_books_of_tenants_that_left_are_closed() -> None:
    worker = Worker()
    for number in range(500):
        worker.come(1000, tenant=number.to_bytes(2, "big"))
        worker.step()
    worker.come(10**5, tenant=b"last")
    while worker.lines:
        worker.step()
    assert len(worker.shares) == 0


@given(LINES, PRIORITIES, st.integers(1, 10**6))
def test_what_is_ahead_grows_with_the_queue_and_is_nothing_on_an_idle_worker(
    lines: list[Line], priority: Priority, tokens: int
) -> None:
    ahead = [
        tokens_ahead(lines[:n], tenant=b"a", priority=priority, tokens=tokens, budget=BUDGET)
        for n in range(len(lines) + 1)
    ]
    assert ahead[0] == 0
    assert ahead == sorted(ahead)
    assert ahead[-1] <= BUDGET + sum(line.remaining for line in lines) * 2 + 2 * tokens


@given(st.integers(1, BUDGET // 2), st.integers(1, 6), st.integers(0, 5))
def test_the_prediction_for_a_short_prompt_is_what_then_happens(
    tokens: int, streams: int, warm_up: int
) -> None:
    worker = Worker()
    for _ in range(streams):
        worker.come(10**6)
    for _ in range(warm_up):
        worker.step()
    predicted = tokens_ahead(
        worker.lines.values(),
        tenant=b"a",
        priority=Priority.NORMAL,
        tokens=tokens,
        budget=BUDGET,
    )
    assert predicted == BUDGET, "one step under way, no more"
