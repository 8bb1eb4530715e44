"""The store's own policy: leaf first, reuse-aware, resistant to scans, with states in their class.

An idle object's score says how long it deserves to stay, on a clock that counts the bytes written
into the store, in units of the capacity (so the same constants hold for any store):

    score = clock when it was last wanted
          + REUSE_TURNS * min(uses, MOST_USES) * cost         for an object that was used again
          - SCAN_PENALTY * never-used bytes of its prompt up to it / capacity     otherwise

The lowest score leaves first, with three rules on top:

- *Leaf first.* A block leaves after the blocks and states that continue it: a prefix without its
  end is of use, an end without its prefix is not. Only if every idle leaf is gone and the rest of
  the tree is held do inner objects leave.
- *Scans.* The first reader of a very long document writes a chain of never-used bytes; its far end
  scores below what anyone else has used lately, so the document shrinks before it flushes others.
- *States.* They are of use only with the blocks under them and are large; beyond their share of the
  capacity they leave before any block does.

`cost` is the price of computing a block again, relative to the first one: linear layers cost the
same everywhere, attention grows with the position (serving.md 4.3: cost x P(reuse) / bytes).
Uses survive eviction in a bounded memory of ghosts: what comes back was wanted.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from dataclasses import dataclass

from kvstore.policy.contracts import Resident
from penstock.blocks import ObjectKind

REUSE_TURNS = 0.5
"""Capacities of writes that one use is worth (`penstock kv trace`: the maximum is flat)."""
MOST_USES = 3
SCAN_PENALTY = 4.0
STATE_SHARE = 0.25
GHOSTS_PER_OBJECT = 4
"""Ids of the evicted that are remembered, for each object that is there; 2^18 at most."""
DOUBLE_COST_TOKENS = 262_144
"""Position at which attention has doubled a block's cost; beyond it the factor stays at 2."""
_LEAST_GHOSTS = 1024
_MOST_GHOSTS = 1 << 18

_Entry = tuple[float, int, bytes]
_Heap = list[_Entry]


@dataclass(slots=True)
class _Node:
    item: Resident
    chain_bytes: int
    """Never-used bytes of the prompt up to this object, itself included."""
    uses: int
    children: int = 0
    score: float = 0.0
    idle: bool = False


class ReuseTree:
    """Residents as a tree of prompts. O(log n) for every call and every victim."""

    def __init__(self, capacity_bytes: int) -> None:
        self._capacity = max(capacity_bytes, 1)
        self._nodes: dict[bytes, _Node] = {}
        self._orphans: dict[bytes, int] = {}
        """Resident children of blocks that are not resident (yet, or any more)."""
        self._ghosts: OrderedDict[bytes, int] = OrderedDict()
        # Heaps hold stale entries too: one counts if its node is idle and still has that score.
        self._leaves: _Heap = []
        self._state_leaves: _Heap = []
        self._inner: _Heap = []
        self._pushes = 0
        self._written = 0
        self._state_bytes = 0
        self._idle_bytes = 0
        self._idle_objects = 0

    @property
    def idle_bytes(self) -> int:
        return self._idle_bytes

    @property
    def idle_objects(self) -> int:
        return self._idle_objects

    def insert(self, item: Resident) -> None:
        self._written += item.size_bytes
        parent = self._nodes.get(item.parent)
        above = parent.chain_bytes if parent is not None and parent.uses == 0 else 0
        came_back = self._ghosts.pop(item.id, None)
        uses = 0 if came_back is None else min(came_back + 1, MOST_USES)
        node = _Node(item, chain_bytes=above + item.size_bytes, uses=uses)
        node.children = self._orphans.pop(item.id, 0)
        self._nodes[item.id] = node
        self._count_child(item.parent, 1)
        if item.kind is ObjectKind.STATE:
            self._state_bytes += item.size_bytes

    def used(self, id_: bytes) -> None:
        node = self._nodes[id_]
        node.uses = min(node.uses + 1, MOST_USES)
        if node.idle:
            self._score(node)

    def hold(self, id_: bytes) -> None:
        node = self._nodes[id_]
        if node.idle:
            node.idle = False
            self._idle_bytes -= node.item.size_bytes
            self._idle_objects -= 1

    def free(self, id_: bytes) -> None:
        node = self._nodes[id_]
        if not node.idle:
            node.idle = True
            self._idle_bytes += node.item.size_bytes
            self._idle_objects += 1
        self._score(node)

    def remove(self, id_: bytes) -> None:
        self.hold(id_)
        node = self._nodes.pop(id_)
        if node.children:
            self._orphans[id_] = node.children
        self._count_child(node.item.parent, -1)
        if node.item.kind is ObjectKind.STATE:
            self._state_bytes -= node.item.size_bytes
        self._ghosts[id_] = node.uses
        most = min(max(GHOSTS_PER_OBJECT * len(self._nodes), _LEAST_GHOSTS), _MOST_GHOSTS)
        while len(self._ghosts) > most:
            self._ghosts.popitem(last=False)

    def victims(self, *, need_bytes: int, need_objects: int) -> list[bytes] | None:
        if need_bytes > self._idle_bytes or need_objects > self._idle_objects:
            return None
        chosen: dict[bytes, None] = {}
        state_bytes = self._state_bytes
        # Children that this very call takes away: their parents become leaves on the way.
        gone: dict[bytes, int] = {}
        while need_bytes > 0 or len(chosen) < need_objects:
            states_over = state_bytes > STATE_SHARE * self._capacity
            heap, entry = self._least(chosen, gone, states_over)
            heapq.heappop(heap)
            id_ = entry[2]
            node = self._nodes[id_]
            chosen[id_] = None
            need_bytes -= node.item.size_bytes
            if node.item.kind is ObjectKind.STATE:
                state_bytes -= node.item.size_bytes
            parent = self._nodes.get(node.item.parent)
            if parent is not None:
                gone[node.item.parent] = gone.get(node.item.parent, 0) + 1
                if parent.idle and parent.children == gone[node.item.parent]:
                    self._push(parent, self._leaves)
        # The caller may keep a victim after all; for those that it removes this entry is stale.
        for id_ in chosen:
            self._push(self._nodes[id_], self._heap_of(self._nodes[id_]))
        return list(chosen)

    # Inside

    def _count_child(self, parent: bytes, change: int) -> None:
        node = self._nodes.get(parent)
        if node is None:
            left = self._orphans.get(parent, 0) + change
            if left > 0:
                self._orphans[parent] = left
            else:
                self._orphans.pop(parent, None)
            return
        was_leaf = node.children == 0
        node.children += change
        if node.idle and was_leaf != (node.children == 0):
            self._push(node, self._heap_of(node))

    def _score(self, node: _Node) -> None:
        turns = self._written / self._capacity
        if node.uses:
            cost = 1 + min(node.item.position / DOUBLE_COST_TOKENS, 1.0)
            score = turns + REUSE_TURNS * node.uses * cost
        else:
            score = turns - SCAN_PENALTY * node.chain_bytes / self._capacity
        node.score = score
        self._push(node, self._heap_of(node))

    def _heap_of(self, node: _Node) -> _Heap:
        if node.children:
            return self._inner
        return self._state_leaves if node.item.kind is ObjectKind.STATE else self._leaves

    def _push(self, node: _Node, heap: _Heap) -> None:
        self._pushes += 1
        heapq.heappush(heap, (node.score, self._pushes, node.item.id))
        if len(heap) > 4 * len(self._nodes) + 1024:
            self._compact(heap)

    def _compact(self, heap: _Heap) -> None:
        """Stale entries never outnumber the residents by more than a constant factor."""
        live = {entry[2]: entry for entry in heap if self._is_live(entry)}
        heap[:] = live.values()
        heapq.heapify(heap)

    def _is_live(self, entry: _Entry) -> bool:
        node = self._nodes.get(entry[2])
        return node is not None and node.idle and node.score == entry[0]

    def _least(
        self, chosen: dict[bytes, None], gone: dict[bytes, int], states_over: bool
    ) -> tuple[_Heap, _Entry]:
        """The next victim's entry, at the top of its heap."""
        blocks = self._top(self._leaves, chosen, gone)
        states = self._top(self._state_leaves, chosen, gone)
        if states is not None and (states_over or blocks is None or states <= blocks):
            return self._state_leaves, states
        if blocks is not None:
            return self._leaves, blocks
        # Every idle leaf is taken; what is left continues into objects that are held.
        inner = self._top(self._inner, chosen, None)
        if inner is None:
            raise AssertionError("the idle bytes were counted wrong")
        return self._inner, inner

    def _top(
        self, heap: _Heap, chosen: dict[bytes, None], gone: dict[bytes, int] | None
    ) -> _Entry | None:
        """The heap's least live entry; with `gone`, of a node whose every child is in it."""
        while heap:
            id_ = heap[0][2]
            live = self._is_live(heap[0]) and id_ not in chosen
            if live and (gone is None or self._nodes[id_].children == gone.get(id_, 0)):
                return heap[0]
            # Stale, or no leaf any more: then it went into the inner heap when that happened.
            heapq.heappop(heap)
        return None
