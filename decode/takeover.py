"""Going on with an answer that another worker began: where from, and what is done over again.

The store holds a state for (almost) every block that the other worker completed. From the newest of
them the few tokens behind it are fed once more; they are known, so nothing is drawn twice. What
else an answer's next token depends on is a function of its tokens: penalties, grammar, stop strings
and the text are replayed from those (`decode.output`, `decode.grammar`), and the sampler draws by
position (`model.sampler`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from decode.speculation import states_between
from kvstore.contracts import BlockStore
from penstock.blocks import BLOCK_TOKENS, STATE_ALIGN_TOKENS
from penstock.identity import Chain

MOST_REPLAYED = 2 * BLOCK_TOKENS
"""Tokens of an answer that a decode worker may compute again; for more than that prefill is the
better place."""
_PIECE = 64
"""Tokens in one piece of work on the engine's thread, so that the other streams go on."""


class Absorbing(Protocol):
    """What replaying needs of a sequence."""

    async def absorb(self, tokens: Sequence[int], states_at: tuple[int, ...]) -> dict[int, bytes]:
        """Feed `tokens`; the states at those positions, by position."""


def cut(chain: Chain, position: int) -> Chain:
    """The chain of the first `position` tokens."""
    return Chain(chain.root, chain.blocks[: position // BLOCK_TOKENS], chain.tokens[:position])


def resume_candidates(first: int, end: int) -> list[int]:
    """Positions in [first, end] where the state of an answer that stands at `end` may be, best
    first. `first` is the prompt's length: decode computes no prompt token.
    """
    lowest = max(first, end - MOST_REPLAYED)
    below = (end - 1) // STATE_ALIGN_TOKENS * STATE_ALIGN_TOKENS
    found = [end, *range(below, lowest - 1, -STATE_ALIGN_TOKENS)]
    return found if lowest == found[-1] or lowest != first else [*found, first]


async def resume_point(
    store: BlockStore, chain: Chain, *, first: int, owner: str, lease_ttl_s: float
) -> int | None:
    """Largest position from which the sequence `chain` can be resumed; its blocks and its state are
    leased to `owner` then. None if there is none.

    Raises StoreUnavailableError.
    """
    candidates = resume_candidates(first, len(chain.tokens))
    ids = [*chain.blocks, *(chain.state_id(position) for position in candidates)]
    held = await store.lease(ids, owner=owner, ttl_s=lease_ttl_s)
    blocks, states = held[: len(chain.blocks)], held[len(chain.blocks) :]
    there = next((i for i, present in enumerate(blocks) if not present), len(blocks))
    for position, present in zip(candidates, states, strict=True):
        if present and position // BLOCK_TOKENS <= there:
            return position
    return None


def _pieces(tokens: Sequence[int], start: int) -> Iterator[tuple[Sequence[int], tuple[int, ...]]]:
    for offset in range(0, len(tokens), _PIECE):
        piece = tokens[offset : offset + _PIECE]
        begin = start + offset
        yield piece, tuple(states_between(begin, begin + len(piece)))


async def replay(
    sequence: Absorbing,
    tokens: Sequence[int],
    start: int,
    on_state: Callable[[int, bytes], None],
) -> None:
    """Feed the tokens from position `start` on; the states passed go to `on_state`."""
    for piece, states_at in _pieces(tokens, start):
        states = await sequence.absorb(piece, states_at)
        for position in states_at:
            on_state(position, states[position])
