"""Which states to keep of a prompt and how to cut its work. Pure.

Retained states (multiples of 128) serve later requests: the prompt's end rounded down, its last
block borders, the ends of messages, and every 8,192 tokens. The state at the end of each chunk is
rolling: it bounds what a crash costs. States never force a cut, for an engine emits them anywhere.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from penstock.blocks import BLOCK_TOKENS, STATE_ALIGN_TOKENS

LAST_BORDERS = 8
PERIOD_TOKENS = 8_192


@dataclass(frozen=True)
class Chunk:
    """Tokens [start, end) of one model step. Positions are absolute."""

    start: int
    end: int
    retained_at: tuple[int, ...]
    """Retained states inside (start, end], ascending."""

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end:
            raise ValueError(f"a chunk [{self.start}, {self.end}) holds no token")

    @property
    def states_at(self) -> tuple[int, ...]:
        """All states that the engine must emit, ascending; the last one is the chunk's end."""
        if self.retained_at and self.retained_at[-1] == self.end:
            return self.retained_at
        return (*self.retained_at, self.end)

    @property
    def blocks(self) -> range:
        """Indices of the blocks that this chunk completes."""
        return range(self.start // BLOCK_TOKENS, self.end // BLOCK_TOKENS)


def aligned(position: int) -> int:
    """The last position at or before this one where a state may be retained."""
    return position // STATE_ALIGN_TOKENS * STATE_ALIGN_TOKENS


def retained_positions(prompt_tokens: int, boundaries: Iterable[int] = ()) -> tuple[int, ...]:
    """Where states of a prompt are retained, ascending; boundaries outside the prompt are left out.

    All are multiples of 128 in 1..prompt_tokens.
    """
    last_block = prompt_tokens // BLOCK_TOKENS
    first_border = max(1, last_block - LAST_BORDERS + 1)
    wanted = {aligned(prompt_tokens)}
    wanted.update(k * BLOCK_TOKENS for k in range(first_border, last_block + 1))
    wanted.update(aligned(b) for b in boundaries if 0 < b <= prompt_tokens)
    wanted.update(range(PERIOD_TOKENS, prompt_tokens + 1, PERIOD_TOKENS))
    wanted.discard(0)
    return tuple(sorted(wanted))


class ChunkPlan:
    """Cuts one prompt's chunks as they are granted, and knows which states to keep.

    A chunk ends at a block border where that costs no progress, so that its blocks are whole.
    """

    def __init__(self, prompt_tokens: int, *, start: int, boundaries: Iterable[int] = ()) -> None:
        if not 0 <= start <= prompt_tokens:
            raise ValueError(f"start {start} is outside 0..{prompt_tokens}")
        self.position = start
        """Everything before has been given out."""
        self.end = prompt_tokens
        self.keep_ends = False
        """Keep the state at each chunk's end too: others will need it if this prompt fails."""
        self._retained = list(retained_positions(prompt_tokens, boundaries))

    @property
    def is_done(self) -> bool:
        return self.position == self.end

    def keep(self, position: int) -> None:
        """A state is wanted there (rounded down to 128), if it is not too late."""
        wanted = aligned(position)
        index = bisect_right(self._retained, wanted)
        known = index and self._retained[index - 1] == wanted
        if self.position < wanted <= self.end and not known:
            self._retained.insert(index, wanted)

    def take(self, most: int) -> Chunk:
        """The next chunk, of at most `most` tokens. Raises ValueError at the end."""
        if most < 1 or self.is_done:
            raise ValueError(f"no chunk of {most} tokens at {self.position} of {self.end}")
        start, end = self.position, min(self.position + most, self.end)
        border = end // BLOCK_TOKENS * BLOCK_TOKENS
        if end < self.end and border > start:
            end = border
        if self.keep_ends:
            self.keep(end)
        first, last = bisect_right(self._retained, start), bisect_right(self._retained, end)
        self.position = end
        return Chunk(start, end, tuple(self._retained[first:last]))


def plan_chunks(
    prompt_tokens: int, *, start: int, chunk_tokens: int, boundaries: Sequence[int] = ()
) -> tuple[Chunk, ...]:
    """Chunks that cover [start, prompt_tokens) in order, each of at most `chunk_tokens`."""
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, not {chunk_tokens}")
    plan = ChunkPlan(prompt_tokens, start=start, boundaries=boundaries)
    chunks = []
    while not plan.is_done:
        chunks.append(plan.take(chunk_tokens))
    return tuple(chunks)


def resume_candidates(prompt_tokens: int) -> tuple[int, ...]:
    """Positions at which a prompt could be resumed, highest first: its end, and multiples of
    128.
    """
    grid = range(aligned(prompt_tokens), 0, -STATE_ALIGN_TOKENS)
    if prompt_tokens % STATE_ALIGN_TOKENS:
        return (prompt_tokens, *grid)
    return tuple(grid)
