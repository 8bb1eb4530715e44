"""What the restore and the router's mirror are held against."""

from __future__ import annotations

from collections.abc import Sequence

from penstock.blocks import BLOCK_TOKENS


def best_resume(
    candidates: Sequence[int], *, states_present: Sequence[bool], blocks_present: Sequence[bool]
) -> int:
    """The highest candidate whose state and whose blocks are all there, or 0."""
    prefix = next((i for i, there in enumerate(blocks_present) if not there), len(blocks_present))
    return max(
        (
            position
            for position, there in zip(candidates, states_present, strict=True)
            if there and position // BLOCK_TOKENS <= prefix
        ),
        default=0,
    )
