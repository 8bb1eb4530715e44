"""`Mirror`: what the store nodes hold, in this process's memory, so that a decision asks nobody.

It is told of every object that comes and goes (`came`, `went`, `lost`) and may be wrong at any
moment: then a worker restores less, or more, than was predicted. Belongs to one thread.

A look-up hashes nothing but the tails of states that lie between block borders: states are found by
the block that they stand on.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import takewhile

from cluster.policy import NOTHING, PromptIds, Resident
from penstock.blocks import BLOCK_TOKENS, ObjectKind

MOST_OBJECTS = 4 << 20
"""Objects that a mirror remembers (some 250 bytes each); what comes beyond is passed over."""


@dataclass(frozen=True, slots=True)
class Came:
    """An object was committed. `parent`: the block before it; `position`: the tokens of the prompt
    up to and with it.
    """

    id: bytes
    parent: bytes
    kind: ObjectKind
    position: int
    size_bytes: int


class Mirror:
    """`most_objects` bounds its memory."""

    def __init__(self, *, most_objects: int = MOST_OBJECTS) -> None:
        self._most = most_objects
        self._sizes: dict[bytes, int] = {}
        """Of every object, by its id."""
        self._nodes: dict[str, dict[bytes, None]] = {}
        self._copies: dict[bytes, int] = {}
        """How many nodes hold it, where that is not one."""
        self._states: dict[bytes, dict[bytes, int]] = {}
        """Block id (or a chain's root) -> states on it by id, with their positions."""
        self._parents: dict[bytes, bytes] = {}
        """State id -> the block that it stands on."""
        self.passed_over = 0

    def __len__(self) -> int:
        return len(self._sizes)

    def nodes(self) -> dict[str, int]:
        """Objects of each node."""
        return {node: len(ids) for node, ids in self._nodes.items()}

    def came(self, node: str, objects: Iterable[Came]) -> None:
        """Told twice is told once."""
        held = self._nodes.setdefault(node, {})
        for item in objects:
            if item.id in held:
                continue
            known = item.id in self._sizes
            if not known and len(self._sizes) >= self._most:
                self.passed_over += 1
                continue
            held[item.id] = None
            if known:
                self._copies[item.id] = self._copies.get(item.id, 1) + 1
                continue
            self._sizes[item.id] = item.size_bytes
            if item.kind is ObjectKind.STATE:
                self._states.setdefault(item.parent, {})[item.id] = item.position
                self._parents[item.id] = item.parent

    def went(self, node: str, ids: Iterable[bytes]) -> None:
        """Ids that the node was not known to hold are passed over."""
        held = self._nodes.get(node, {})
        for id_ in ids:
            if id_ in held:
                del held[id_]
                self._forget(id_)

    def lost(self, node: str) -> None:
        """The node is gone, began a new epoch, or is about to tell everything again."""
        for id_ in self._nodes.pop(node, {}):
            self._forget(id_)

    def resident(self, prompt: PromptIds) -> Resident:
        blocks = prompt.blocks
        sizes = self._sizes
        count = len(list(takewhile(sizes.__contains__, blocks)))
        best = self._resumable(prompt, count)
        if best is None:
            return Resident(overlap_tokens=count * BLOCK_TOKENS) if count else NOTHING
        position, state = best
        size_bytes = sum(map(sizes.__getitem__, blocks[: position // BLOCK_TOKENS]))
        return Resident(
            resumable_tokens=position,
            fetch_bytes=size_bytes + sizes[state],
            overlap_tokens=count * BLOCK_TOKENS,
        )

    def _resumable(self, prompt: PromptIds, count: int) -> tuple[int, bytes] | None:
        """The last position with a state on the first `count` blocks, and that state. What ends
        before the first border is not looked for.
        """
        states = self._states
        for full in range(count, 0, -1):
            found = states.get(prompt.blocks[full - 1])
            if not found:
                continue
            for id_, position in sorted(found.items(), key=lambda item: -item[1]):
                if position // BLOCK_TOKENS != full or position > len(prompt.tokens):
                    continue
                # The tail's tokens are not in the block's id: only the state's own id tells.
                if position % BLOCK_TOKENS == 0 or prompt.state_id(position) == id_:
                    return position, id_
        return None

    def _forget(self, id_: bytes) -> None:
        copies = self._copies.get(id_, 1)
        if copies > 2:
            self._copies[id_] = copies - 1
            return
        if copies == 2:
            del self._copies[id_]
            return
        del self._sizes[id_]
        parent = self._parents.pop(id_, None)
        if parent is not None:
            on_it = self._states[parent]
            del on_it[id_]
            if not on_it:
                del self._states[parent]
