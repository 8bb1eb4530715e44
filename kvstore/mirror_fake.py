"""`FakeMirror`: a mirror of what its holder says, for tests and simulations."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kvstore.mirror import PromptIds, Resumable, resumable_tokens
from penstock.blocks import BLOCK_TOKENS


class FakeMirror:
    """`Mirror` over plain sets of ids."""

    def __init__(self) -> None:
        self.ids: dict[str, set[bytes]] = {}
        """By node."""
        self.age_s = 0.0

    def store(self, ids: Iterable[bytes], *, node: str = "node") -> None:
        self.ids.setdefault(node, set()).update(ids)

    def remove(self, ids: Iterable[bytes], *, node: str = "node") -> None:
        self.ids.setdefault(node, set()).difference_update(ids)

    def resumable(self, prompt: PromptIds) -> Resumable:
        present = self._has(prompt.blocks)
        blocks = next((at for at, there in enumerate(present) if not there), len(present))
        return Resumable(
            resumable_tokens(prompt, blocks, self._has),
            blocks * BLOCK_TOKENS,
            self.age_s,
            {
                node: count
                for node, ids in self.ids.items()
                if (count := sum(id_ in ids for id_ in prompt.blocks[:blocks]))
            },
        )

    def nodes_of(self, ids: Sequence[bytes]) -> list[tuple[str, ...]]:
        return [tuple(node for node, held in self.ids.items() if id_ in held) for id_ in ids]

    def _has(self, ids: Sequence[bytes]) -> list[bool]:
        return [any(id_ in held for held in self.ids.values()) for id_ in ids]
