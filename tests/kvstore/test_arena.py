"""Shared memory: nothing overlaps, nothing is lost, what is free goes back to the system."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.arena import RECYCLED_BYTES, Arena, ArenaReader, host_identity

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="needs Linux's memfd")
PAGE = 4096


@pytest.fixture(scope="module")
def arena() -> Iterator[Arena]:
    yield Arena(1 << 20)


STEPS = st.lists(st.tuples(st.integers(1, 9 * PAGE), st.integers(0, 7)), max_size=40)


@settings(deadline=None, max_examples=60)
@given(steps=STEPS)
def test_live_memory_never_overlaps_and_a_reader_sees_the_same(
    arena: Arena, steps: list[tuple[int, int]]
) -> None:
    reader = ArenaReader(os.getpid(), arena.fd, arena.secret)
    live: dict[int, memoryview] = {}
    for number, (size, slot) in enumerate(steps):
        live.pop(slot, None)
        view = arena.allocate(size)
        assert view is not None and len(view) == size
        view[:] = bytes([number]) * size
        live[slot] = view.toreadonly()[:]
        del view
    marks = {bytes(view[:1]) for view in live.values()}
    assert len(marks) == len(live)
    for view in live.values():
        assert set(view) == set(view[:1])
        offset = arena.offset_of(view)
        assert offset is not None and offset >= PAGE
        assert reader.copy(offset, len(view)) == view
    reader.close()
    reader.close()


def test_freed_memory_goes_back_to_the_system_and_its_addresses_are_used_again() -> None:
    arena = Arena(32 << 20)
    sizes = [1 << 20, (1 << 20) + 5 * PAGE, 3 << 20]
    for round_ in range(60):
        views = [arena.allocate(sizes[round_ % 3] + number * PAGE) for number in range(8)]
        assert all(view is not None for view in views)
        for view in views:
            assert view is not None
            view[::PAGE] = b"x" * len(view[::PAGE])
        held = sum(len(view) for view in views if view is not None)
        assert arena.memory_bytes <= held + RECYCLED_BYTES + (8 << 20)
    del view, views
    assert arena.memory_bytes <= RECYCLED_BYTES + PAGE


def test_what_does_not_fit_is_said_and_nothing_else_breaks() -> None:
    arena = Arena(1 << 20)
    assert arena.allocate(1 << 30) is None
    view = arena.allocate(10)
    assert view is not None and arena.offset_of(view) is not None
    assert arena.offset_of(memoryview(bytearray(10))) is None
    assert arena.offset_of(memoryview(b"")) is None


def test_a_reader_opens_that_arena_and_nothing_else() -> None:
    arena, other = Arena(1 << 20), Arena(1 << 20)
    pipe = os.pipe()
    for fd, secret in (
        (other.fd, arena.secret),
        (arena.fd, b""),
        (arena.fd, bytes(32)),
        (pipe[0], arena.secret),
        (999_999, arena.secret),
    ):
        with pytest.raises(OSError):
            ArenaReader(os.getpid(), fd, secret)
    with pytest.raises(OSError):
        ArenaReader(2**22 + 1, arena.fd, arena.secret)
    reader = ArenaReader(os.getpid(), arena.fd, arena.secret)
    with pytest.raises(OSError, match="ends inside"):
        reader.copy(1 << 40, 10)
    reader.close()
    for end in pipe:
        os.close(end)


def test_one_host_is_one_identity() -> None:
    assert len(host_identity()) == 32
    assert host_identity() == host_identity()


def test_memory_that_could_become_shorter_is_not_mapped() -> None:
    fd = os.memfd_create("penstock-kv", os.MFD_CLOEXEC)
    secret = bytes(range(32))
    os.pwrite(fd, secret + bytes(PAGE), 0)
    with pytest.raises(OSError, match="shorter"):
        ArenaReader(os.getpid(), fd, secret)
    os.close(fd)
    arena = Arena(1 << 20)
    with pytest.raises(OSError):
        os.ftruncate(arena.fd, PAGE)


def test_a_full_budget_keeps_what_it_frees_and_an_empty_one_prepares_no_more_than_it_has() -> None:
    arena = Arena(8 << 20)
    views = [arena.allocate(1 << 20) for _ in range(8)]
    offsets = {arena.offset_of(view) for view in views if view is not None}
    for view in views:
        assert view is not None
        view[:] = bytes(len(view))
    del view, views
    again = [arena.allocate(1 << 20) for _ in range(8)]
    assert {arena.offset_of(view) for view in again if view is not None} == offsets
    empty = Arena(8 << 20)
    first = empty.allocate(1 << 16)
    deadline = time.monotonic() + 5
    while empty.memory_bytes < 4 << 20 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert first is not None and 4 << 20 <= empty.memory_bytes <= (8 << 20) + 2 * PAGE
