"""The seam of mirrors: `Mirror`, what the store nodes hold as a router knows it, without a call.

Rules for every implementation; `tests/kvstore/test_mirror.py` follows them:
- No I/O and no waiting in an answer. It may be old (`age_s` says how old), and an object that it
  names may be gone: that costs a wasted plan, never a wrong byte.
- After the nodes fall silent it holds what they hold, whatever was cut or restarted on the way.
- It knows names of objects, the first 8 bytes of their ids. Who has a prompt's tokens and its
  tenant's namespace can ask for it; nobody learns an id, a prompt or a tenant from it.
- Its memory is bounded by the nodes' `max_objects`, at about 10 bytes an object.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Protocol

from penstock.blocks import BLOCK_TOKENS, STATE_ALIGN_TOKENS

NAME_BYTES = 8
FINE_STATES = 512
"""States looked for at every 128 tokens back from the end of what is there: 65,536 tokens."""
PERIOD_TOKENS = 8_192
"""Beyond them only where prefill keeps a state of every prompt."""


class PromptIds(Protocol):
    """A prompt's identity; `penstock.identity.Chain` is one."""

    @property
    def blocks(self) -> tuple[bytes, ...]: ...

    @property
    def tokens(self) -> tuple[int, ...]: ...

    def state_id(self, position: int) -> bytes: ...


@dataclass(frozen=True)
class Resumable:
    """What of a prompt is there."""

    tokens: int = 0
    """A state stands at this position and every block before it is there."""
    overlap_tokens: int = 0
    """Of the whole blocks from the start on, state or not."""
    age_s: float = float("inf")
    """The answer may be as old as this; infinite before the first picture of a node."""
    blocks_by_node: Mapping[str, int] = field(default_factory=dict)
    """Of the blocks of `overlap_tokens`, how many each node has."""


class Mirror(Protocol):
    """What the nodes hold, as far as this process knows."""

    @property
    def age_s(self) -> float:
        """Seconds since the most silent of the nodes spoke; infinite before all have."""

    def resumable(self, prompt: PromptIds) -> Resumable:
        """The longest prefix of `prompt` that can be resumed."""

    def nodes_of(self, ids: Sequence[bytes]) -> list[tuple[str, ...]]:
        """Which nodes have each of `ids`, by name."""


def states_to_try(prompt: PromptIds, blocks: int) -> Iterator[int]:
    """Positions, highest first, at which a state would let `prompt` be resumed when its first
    `blocks` blocks are there.
    """
    length = len(prompt.tokens)
    end = min(length, (blocks + 1) * BLOCK_TOKENS - 1)
    if end == length and end % STATE_ALIGN_TOKENS:
        yield end
    grid = range(end // STATE_ALIGN_TOKENS * STATE_ALIGN_TOKENS, 0, -STATE_ALIGN_TOKENS)
    yield from grid[:FINE_STATES]
    yield from (position for position in grid[FINE_STATES:] if position % PERIOD_TOKENS == 0)


def resumable_tokens(
    prompt: PromptIds, blocks: int, has: Callable[[Sequence[bytes]], Sequence[bool]]
) -> int:
    """The highest of `states_to_try` that `has` knows, or 0. Asks in growing batches: a state is
    nearly always close to the end, and each costs a hash.
    """
    positions = states_to_try(prompt, blocks)
    size = 4
    while batch := list(islice(positions, size)):
        present = has([prompt.state_id(position) for position in batch])
        for position, there in zip(batch, present, strict=True):
            if there:
                return position
        size = min(4 * size, 256)
    return 0
