"""The plan of a prompt: every token once, every wanted state, nothing else."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from penstock.blocks import BLOCK_TOKENS, STATE_ALIGN_TOKENS
from prefill.planner import (
    LAST_BORDERS,
    PERIOD_TOKENS,
    plan_chunks,
    resume_candidates,
    retained_positions,
)
from tests.prefill.oracle import best_resume

LENGTHS = st.one_of(st.integers(1, 700), st.integers(1, 40_000))
BOUNDARIES = st.lists(st.integers(0, 50_000), max_size=6)


@st.composite
def plans(draw: st.DrawFn) -> tuple[int, int, int, list[int]]:
    length = draw(LENGTHS)
    start = draw(st.integers(0, length))
    return length, start, draw(st.integers(16, 5000)), draw(BOUNDARIES)


@given(plans())
def test_chunks_cover_each_token_once_and_keep_their_bound(
    case: tuple[int, int, int, list[int]],
) -> None:
    length, start, most, boundaries = case
    chunks = plan_chunks(length, start=start, chunk_tokens=most, boundaries=boundaries)
    at = start
    for chunk in chunks:
        assert chunk.start == at
        assert chunk.end - chunk.start <= most
        at = chunk.end
    assert at == length
    done = [index for chunk in chunks for index in chunk.blocks]
    assert done == list(range(start // BLOCK_TOKENS, length // BLOCK_TOKENS))


@given(plans())
def test_every_wanted_state_is_emitted_once_and_each_end_is_one(
    case: tuple[int, int, int, list[int]],
) -> None:
    length, start, most, boundaries = case
    chunks = plan_chunks(length, start=start, chunk_tokens=most, boundaries=boundaries)
    retained = [position for chunk in chunks for position in chunk.retained_at]
    assert retained == [p for p in retained_positions(length, boundaries) if p > start]
    for chunk in chunks:
        assert list(chunk.states_at) == sorted(set(chunk.states_at))
        assert chunk.states_at[-1] == chunk.end
        assert all(chunk.start < position <= chunk.end for position in chunk.states_at)
        assert set(chunk.states_at) == {*chunk.retained_at, chunk.end}


@given(LENGTHS, BOUNDARIES)
def test_retained_positions_are_those_of_the_design(length: int, boundaries: list[int]) -> None:
    got = set(retained_positions(length, boundaries))
    assert all(p % STATE_ALIGN_TOKENS == 0 and 0 < p <= length for p in got)
    borders = range(BLOCK_TOKENS, length + 1, BLOCK_TOKENS)[-LAST_BORDERS:]
    want = {length // 128 * 128, *borders, *range(PERIOD_TOKENS, length + 1, PERIOD_TOKENS)}
    want |= {b // 128 * 128 for b in boundaries if b <= length}
    assert got == want - {0}


@given(st.integers(1, 3000), st.data())
def test_the_best_resume_is_the_highest_that_is_whole(length: int, data: st.DataObject) -> None:
    candidates = resume_candidates(length)
    assert list(candidates) == sorted({length, *range(128, length + 1, 128)}, reverse=True)
    states = data.draw(st.lists(st.booleans(), min_size=len(candidates), max_size=len(candidates)))
    blocks = data.draw(st.lists(st.booleans(), min_size=length // 256, max_size=length // 256))
    whole = [
        position
        for position, there in zip(candidates, states, strict=True)
        if there and all(blocks[: position // 256])
    ]
    best = best_resume(candidates, states_present=states, blocks_present=blocks)
    assert best == max(whole, default=0)


def test_a_million_tokens_are_planned_in_a_moment() -> None:
    chunks = plan_chunks(1_000_000, start=0, chunk_tokens=2048)
    assert len(chunks) == 489
    # 122 periods and 8 borders; 999,424 is both, and the last border is the end rounded down.
    assert sum(len(chunk.retained_at) for chunk in chunks) == 122 + 8 - 1
