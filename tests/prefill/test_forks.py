"""A beginning that two prompts share is resumed by the second one, and at the fork by the third."""

from __future__ import annotations

from itertools import pairwise

import pytest

from prefill.planner import PERIOD_TOKENS
from tests.decode.pair import pair, prompt_of

B, C, D = (prompt_of(length, seed) for length, seed in ((3000, 2), (700, 3), (900, 4)))
LENGTHS = [100, 300, 8191, 8192, 20_000, 24_700]


@pytest.mark.parametrize("is_message", [False, True])
async def test_a_plus_c_resumes_what_a_plus_b_left(is_message: bool) -> None:
    for length in LENGTHS:
        async with pair() as workers:
            a = prompt_of(length, seed=length)
            boundaries = [length] if is_message else []
            first = await workers.read(a + B, boundaries=boundaries)
            second = await workers.read(a + C, boundaries=boundaries)
            assert first.cached_tokens == 0
            least = length // PERIOD_TOKENS * PERIOD_TOKENS
            if is_message:
                least = max(least, length - 128)
            assert least <= second.cached_tokens <= length, length
            assert second.cached_tokens + second.computed_tokens == len(a + C)


async def test_a_fork_that_the_second_prompt_found_is_where_the_third_one_starts() -> None:
    for length in LENGTHS:
        async with pair() as workers:
            a = prompt_of(length, seed=length)
            cached = [(await workers.read(a + rest)).cached_tokens for rest in (B, C, D)]
            assert cached[0] == 0
            assert cached[2] == max(cached[1], length // 256 * 256), length


async def test_forks_at_several_depths_are_all_kept() -> None:
    """A tree of prompts: each that leaves it at a new place makes that place resumable."""
    trunk = prompt_of(9000, seed=9)
    async with pair() as workers:
        await workers.read(trunk + B)
        depths = [4000, 2100, 6500]
        for number, depth in enumerate(depths):
            await workers.read(trunk[:depth] + prompt_of(600, 20 + number))
        for number, depth in enumerate(depths):
            again = await workers.read(trunk[:depth] + prompt_of(600, 30 + number))
            assert again.cached_tokens == depth // 256 * 256


async def test_a_prompt_that_only_goes_on_is_no_fork() -> None:
    """A conversation's next turn resumes at the end of the one before it."""
    turns = [prompt_of(length, seed=7) for length in (5000, 5600, 6300)]
    async with pair() as workers:
        cached = [(await workers.read(turn)).cached_tokens for turn in turns]
    for before, (_, got) in zip(turns, pairwise(cached), strict=False):
        assert got >= len(before) // 128 * 128
