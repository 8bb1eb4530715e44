"""Buffers that are used again: never two owners of one, and no more kept than said."""

from __future__ import annotations

import gc
import threading

from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.buffers import Buffers

STEPS = st.lists(st.tuples(st.booleans(), st.integers(0, 7)), max_size=60)


@settings(max_examples=60, deadline=None)
@given(steps=STEPS)
def test_nobody_writes_into_anothers_buffer_and_little_is_kept(
    steps: list[tuple[bool, int]],
) -> None:
    buffers = Buffers(kept_bytes=1000)
    held: list[tuple[memoryview, int]] = []
    for number, (takes, which) in enumerate(steps):
        if takes:
            view = buffers.new((which + 1) * 100)
            view[:] = bytes([number]) * len(view)
            # A part of it keeps all of it.
            held.append((view[10:20], number))
        elif held:
            del held[which % len(held)]
        assert all(bytes(part) == bytes([mark]) * 10 for part, mark in held)
        assert buffers.kept_bytes <= 1000


def test_a_freed_buffer_is_the_next_one_of_its_size() -> None:
    buffers = Buffers(kept_bytes=1 << 20)
    view = buffers.new(1 << 16)
    view[:5] = b"trace"
    del view
    assert bytes(buffers.new(1 << 16)[:5]) == b"trace"
    buffers.new(2 << 20)
    assert buffers.kept_bytes <= 1 << 20


def test_many_threads_and_a_collector_that_frees_in_the_middle() -> None:
    buffers = Buffers(kept_bytes=1 << 16)
    wrong: list[int] = []

    def work(mark: int) -> None:
        for turn in range(300):
            view = buffers.new(512 * (1 + turn % 3))
            view[:] = bytes([mark]) * len(view)
            cycle: list[object] = [view]
            cycle.append(cycle)
            if bytes(view) != bytes([mark]) * len(view):
                wrong.append(mark)
            if turn % 50 == 0:
                gc.collect()

    threads = [threading.Thread(target=work, args=(mark,)) for mark in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    gc.collect()
    assert not wrong and buffers.kept_bytes <= 1 << 16
