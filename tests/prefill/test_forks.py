"""A beginning that two prompts share is resumed by the second one, and at the fork by the third."""

from __future__ import annotations

import asyncio
import random
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.client import StoreClient
from kvstore.config import StoreConfig
from kvstore.server import start_server
from model.fake import FakeEngine
from prefill.planner import PERIOD_TOKENS, retained_positions
from tests.decode.pair import Pair, pair, prompt_of

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


MEMORY_BYTES = 400_000
"""Holds the longest prompt drawn here, and not another one beside it."""


@asynccontextmanager
async def node_on(folder: str) -> AsyncIterator[Pair]:
    """A prefill worker over a node with a disk tier, by gRPC; ends with the node."""
    config = StoreConfig(
        memory_bytes=MEMORY_BYTES,
        disk_bytes=8 << 20,
        disk_dir=folder,
        disk_extent_bytes=1 << 19,
        disk_sync_s=0.05,
    )
    server = await start_server(config)
    info = FakeEngine().info
    client = StoreClient(server.address, fingerprint=info.fingerprint, layout=info.layout)
    try:
        async with pair(store=client) as workers:
            yield workers
            for name in workers.names:
                await client.release(name)
    finally:
        await client.close()
        await server.stop()


def drawn_cases() -> list[tuple[int, int, int, bool, str]]:
    """(|A|, |B|, |C|, whether A ends at a message, what happens between); not by hypothesis, for
    gRPC's event loop must be one.
    """
    rng = random.Random(7)
    edges = [8191, 8192, 8193, 16_384, 127]
    lengths = [*edges, *(rng.randrange(1, 25_000) for _ in range(13))]
    return [
        (
            length,
            rng.randrange(1, 3000),
            rng.randrange(1, 3000),
            rng.random() < 0.5,
            ("none", "pressure", "restart")[number % 3],
        )
        for number, length in enumerate(lengths)
    ]


async def test_the_second_of_two_that_share_a_beginning_finds_it() -> None:
    """Issue 7: at least floor(|A|/8192)*8192 tokens, and |A| - 128 if A ends at a message; after
    eviction from memory and after a restart too. A replay brings it to the last block in any case.
    """
    for length, b_length, c_length, is_message, trouble in drawn_cases():
        a, boundaries = prompt_of(length, 1), [length] if is_message else []
        # No first token in common.
        b, c = [250, *prompt_of(b_length, 2)], [249, *prompt_of(c_length, 3)]
        with tempfile.TemporaryDirectory() as folder:
            async with node_on(folder) as workers:
                first = await workers.read(a + b, boundaries=boundaries)
                assert first.cached_tokens == 0
                await workers.store.release(workers.names[-1])
                if trouble == "pressure":
                    # What memory lets go of before it is on disk is gone, and rightly so.
                    while (await workers.store.stat()).disk_queued_bytes:  # noqa: ASYNC110 - a disk
                        await asyncio.sleep(0.01)
                    for seed in (9, 8):
                        await workers.read(prompt_of(25_000, seed))
                        await workers.store.release(workers.names[-1])
                    assert (await workers.store.stat()).evictions > 0
                if trouble != "restart":
                    second = await workers.read(a + c, boundaries=boundaries)
            if trouble == "restart":
                async with node_on(folder) as workers:
                    second = await workers.read(a + c, boundaries=boundaries)
        least = length // PERIOD_TOKENS * PERIOD_TOKENS
        if is_message:
            least = max(least, length - 128)
        replayed = length // 256 * 256 - FakeEngine().info.replay_tokens
        case = (length, is_message, trouble)
        assert max(least, replayed) <= second.cached_tokens <= length, case
        assert second.cached_tokens + second.computed_tokens == len(a + c)


@given(st.integers(1, 60_000), st.lists(st.integers(-5, 61_000), max_size=6))
def test_states_lie_where_the_rule_says_and_on_the_grid(length: int, ends: list[int]) -> None:
    """Prompt end, message ends, every 8,192 tokens, the last 8 borders; multiples of 128 only."""
    kept = set(retained_positions(length, ends))
    assert all(0 < place <= length and place % 128 == 0 for place in kept)
    wanted = {length // 128 * 128, *range(PERIOD_TOKENS, length + 1, PERIOD_TOKENS)}
    wanted |= {end // 128 * 128 for end in ends if 0 < end <= length}
    wanted |= {(length // 256 - k) * 256 for k in range(8) if length // 256 > k}
    assert kept == wanted - {0}
