"""Loads: ours exactly, others' as far as heartbeats tell."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cluster.policy import DECODE, NO_LOAD, PREFILL, Load
from cluster.routing.board import Board, most_of, others_of, reported
from tests.cluster.routing.pools import worker

loads = st.builds(
    Load,
    st.integers(0, 10_000),
    st.floats(0, 1e9),
    st.integers(0, 20),
    st.integers(0, 20),
    st.integers(0, 10**6),
)


def test_one_front_alone_sees_its_own_work_once() -> None:
    """The heartbeat repeats what we charged: it must not count twice."""
    board = Board()
    view = worker("p0", PREFILL)
    board.show([view], others={"p0": NO_LOAD})
    board.charge("p0", Load(tokens=700, prompts=2))
    told = worker("p0", PREFILL, queued_tokens=700, running=2)
    board.show([told], others={"p0": others_of(told, most_of([board.take_peaks()["p0"]]))})
    assert board.load("p0").tokens == 700
    assert board.load("p0").prompts == 2
    # Finished here, still in the next heartbeat: it is not somebody else's work either.
    board.charge("p0", Load(tokens=700, prompts=2), back=True)
    ours = most_of([board.take_peaks()["p0"]])
    board.show([told], others={"p0": others_of(told, ours)})
    assert board.load("p0") == NO_LOAD
    assert board.take_peaks() == {}


@given(loads, loads)
def test_others_are_never_negative_and_never_more_than_told(ours: Load, theirs: Load) -> None:
    for role in (PREFILL, DECODE):
        view = worker(
            "w",
            role,
            queued_tokens=theirs.tokens,
            running=theirs.prompts,
            used_bytes=theirs.size_bytes,
        )
        told, left = reported(view), others_of(view, ours)
        for name in ("tokens", "pairs", "prompts", "sequences", "size_bytes"):
            assert 0 <= getattr(left, name) <= getattr(told, name)


@given(st.lists(loads, max_size=8))
def test_the_board_holds_exactly_what_was_charged(given_loads: list[Load]) -> None:
    board = Board()
    board.show([worker("p0", PREFILL)])
    for load in given_loads:
        board.charge("p0", load)
    total = board.load("p0")
    assert total.tokens == sum(load.tokens for load in given_loads)
    assert total.size_bytes == sum(load.size_bytes for load in given_loads)
    board.show([])
    board.show([worker("p0", PREFILL)])
    assert board.load("p0") == total, "charges outlive a picture"
