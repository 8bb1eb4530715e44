"""What the store holds, as far as a front can tell from the prompts that passed through it.

It is a guess: other fronts' prompts are not in it, and nobody tells what was evicted. So it is
bounded, forgets by age, and each prompt that restores less than was expected corrects it.
"""

from __future__ import annotations

from collections.abc import Iterable

from cluster.policy import NOTHING, Resident
from cluster.routing.mirror import Came, Mirror
from penstock.blocks import BLOCK_TOKENS, ObjectKind
from penstock.identity import Chain
from prefill.planner import retained_positions

MOST_LEARNT_OBJECTS = 1 << 18
"""Blocks and states; some 250 bytes each."""
STATE_TOKENS = 1_024
"""A state weighs about as much as the KV of so many tokens."""


class Learnt:
    """Two generations: when the younger one is full, the older is forgotten; what is wanted again
    is learnt again.
    """

    def __init__(self, *, most_objects: int = MOST_LEARNT_OBJECTS) -> None:
        self._half = max(1, most_objects // 2)
        self._mirror = Mirror(most_objects=most_objects)
        self._generation = 0

    def __len__(self) -> int:
        return len(self._mirror)

    def resident(self, chain: Chain) -> Resident:
        return self._mirror.resident(chain) if len(self._mirror) else NOTHING

    def read(self, chain: Chain, boundaries: Iterable[int], bytes_per_token: float) -> None:
        """A prompt was read to its end: its blocks and retained states have been committed."""
        block_bytes = int(BLOCK_TOKENS * bytes_per_token)
        objects = [
            Came(id_, chain.parent(i), ObjectKind.BLOCK, (i + 1) * BLOCK_TOKENS, block_bytes)
            for i, id_ in enumerate(chain.blocks)
        ]
        state_bytes = int(STATE_TOKENS * bytes_per_token)
        for position in retained_positions(len(chain.tokens), boundaries):
            parent = chain.parent(position // BLOCK_TOKENS)
            id_ = chain.state_id(position)
            objects.append(Came(id_, parent, ObjectKind.STATE, position, state_bytes))
        young = self._mirror.nodes().get(str(self._generation), 0)
        if young and young + len(objects) > self._half:
            self._mirror.lost(str(self._generation - 1))
            self._generation += 1
        self._mirror.came(str(self._generation), objects)

    def restored(self, chain: Chain, *, expected: int, actual: int) -> None:
        """It was resumed at `actual`: what would have served up to `expected` is not all there."""
        if actual >= expected:
            return
        lost = chain.blocks[actual // BLOCK_TOKENS : expected // BLOCK_TOKENS]
        states = [chain.state_id(expected)]
        for generation in (self._generation, self._generation - 1):
            self._mirror.went(str(generation), (*lost, *states))
