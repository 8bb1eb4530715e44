"""Credits: never more than there is, first come first served, and zero at the end."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from decode.admission import Admission, Need
from penstock.errors import ContextLengthError, OverloadedError

CAPACITY, SLOTS, LINE = 100, 3, 4


class Credits(RuleBasedStateMachine):
    """Random arrivals, ends and cancels against a list that is obviously right."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.admission = Admission(CAPACITY, SLOTS, LINE)
        self.sizes: dict[asyncio.Task[None], int] = {}
        self.ends: dict[asyncio.Task[None], asyncio.Event] = {}
        self.order: list[asyncio.Task[None]] = []
        self.inside: list[asyncio.Task[None]] = []

    def turn(self) -> None:
        for _ in range(5):
            self.loop.run_until_complete(asyncio.sleep(0))

    async def hold(self, need: Need, end: asyncio.Event) -> None:
        async with self.admission.reserved(need, timeout_s=60):
            task = asyncio.current_task()
            assert task is not None
            self.inside.append(task)
            try:
                await end.wait()
            finally:
                self.inside.remove(task)

    @rule(size=st.integers(1, CAPACITY + 20))
    def arrive(self, size: int) -> None:
        line = self.admission.queued
        end = asyncio.Event()
        task = self.loop.create_task(self.hold(Need(size * 256, size), end))
        self.turn()
        if size > CAPACITY:
            assert isinstance(task.exception(), ContextLengthError)
        elif task.done():
            assert isinstance(task.exception(), OverloadedError)
            assert line == LINE
        else:
            self.sizes[task], self.ends[task] = size, end
            self.order.append(task)

    @precondition(lambda self: self.order)
    @rule(data=st.data(), cancel=st.booleans())
    def leave(self, data: st.DataObject, cancel: bool) -> None:
        task = data.draw(st.sampled_from(self.order))
        if cancel:
            task.cancel()
        elif task in self.inside:
            self.ends[task].set()
        else:
            return
        self.turn()
        assert task.done()
        self.order.remove(task)

    @invariant()
    def counts_are_those_of_who_is_inside(self) -> None:
        held = sum(self.sizes[task] for task in self.inside)
        assert self.admission.reserved_bytes == held <= CAPACITY
        assert self.admission.running == len(self.inside) <= SLOTS
        assert self.admission.pages == held
        assert self.admission.tokens == held * 256
        assert self.admission.queued == len(self.order) - len(self.inside) <= LINE

    @invariant()
    def first_come_first_served(self) -> None:
        waiting = [task for task in self.order if task not in self.inside]
        assert waiting == self.order[len(self.order) - len(waiting) :]
        if waiting and len(self.inside) < SLOTS:
            room = CAPACITY - self.admission.reserved_bytes
            assert self.sizes[waiting[0]] > room, "the head of the line could have gone in"

    def teardown(self) -> None:
        for task in self.order:
            task.cancel()
        self.turn()
        admission = self.admission
        counts = (admission.reserved_bytes, admission.running, admission.pages, admission.tokens)
        self.loop.close()
        assert counts == (0, 0, 0, 0)


TestCredits = Credits.TestCase
TestCredits.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


async def test_a_wait_in_vain_leaves_no_trace() -> None:
    admission = Admission(CAPACITY, SLOTS, LINE)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(admission.reserved(Need(256, 90), timeout_s=1))
        with pytest.raises(OverloadedError):
            await stack.enter_async_context(admission.reserved(Need(256, 20), timeout_s=0.02))
        assert admission.queued == 0
        await stack.enter_async_context(admission.reserved(Need(256, 10), timeout_s=1))
    assert (admission.reserved_bytes, admission.running) == (0, 0)


async def test_many_cancels_in_one_moment_leave_no_trace() -> None:
    admission = Admission(CAPACITY, SLOTS, LINE)

    async def hold() -> None:
        async with admission.reserved(Need(256, 90), timeout_s=60):
            await asyncio.Event().wait()

    tasks = [asyncio.create_task(hold()) for _ in range(4)]
    await asyncio.sleep(0.01)
    assert admission.queued == 3
    for task in tasks:
        task.cancel()
    ends = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(end, asyncio.CancelledError) for end in ends)
    assert (admission.reserved_bytes, admission.running, admission.queued) == (0, 0, 0)
