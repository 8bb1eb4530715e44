"""The shared store: the node's own catalogue and eviction policies, without bytes.

States stand where `prefill.planner` retains them, as far as a block border falls there; others
could not be found again: a trace has no ids for them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from cluster.simulate.costs import Costs
from cluster.simulate.trace import SimRequest, Trace
from kvstore.catalog import Catalog, Limits
from kvstore.policy.choice import Eviction, open_policy
from penstock.blocks import BLOCK_TOKENS, ObjectKind
from penstock.errors import OverloadedError
from prefill.planner import Chunk, retained_positions

_MANY = 1 << 60
_LEASE_S = 1e9


class SimStore:
    """`capacity_bytes` None: never evicts."""

    def __init__(
        self,
        costs: Costs,
        *,
        capacity_bytes: int | None,
        eviction: Eviction,
        clock: Callable[[], float],
    ) -> None:
        self.block_bytes = costs.size_bytes(BLOCK_TOKENS)
        self.state_bytes = costs.state_bytes
        capacity = _MANY if capacity_bytes is None else capacity_bytes
        largest = max(self.block_bytes, self.state_bytes)
        limits = Limits(
            capacity_bytes=max(capacity, largest),
            max_object_bytes=largest,
            max_objects=_MANY,
            max_leases=_MANY,
            max_lease_ttl_s=_LEASE_S,
        )
        self.catalog = Catalog(limits, policy=open_policy(eviction, capacity), clock=clock)
        self.refused = 0
        """Objects that found no room: every other byte was leased."""

    def resumable(self, request: SimRequest) -> tuple[int, int]:
        """Tokens from which the prompt could go on, and tokens whose blocks are there."""
        has = self.catalog.has(request.blocks)
        matched = present = has.index(False) if False in has else len(has)
        if self.state_bytes:
            while present and self.catalog.entry(state_id(request.blocks[present - 1])) is None:
                present -= 1
        return present * BLOCK_TOKENS, matched * BLOCK_TOKENS

    def restore(self, owner: str, request: SimRequest) -> tuple[int, int]:
        """`resumable`, and what of it is needed is leased."""
        resumable, matched = self.resumable(request)
        count = resumable // BLOCK_TOKENS
        if count and self.state_bytes:
            self.catalog.lease(owner, (state_id(request.blocks[count - 1]),), _LEASE_S)
        self.catalog.lease(owner, request.blocks[:count], _LEASE_S)
        return resumable, matched

    def publish(self, owner: str, request: SimRequest, chunk: Chunk) -> int:
        """Commit what a chunk completes, leased; bytes written."""
        written = 0
        ids = request.blocks
        for index in chunk.blocks:
            if index < len(ids):
                parent = ids[index - 1] if index else b""
                position = (index + 1) * BLOCK_TOKENS
                written += self._put(
                    owner, ids[index], ObjectKind.BLOCK, self.block_bytes, parent, position
                )
        for position in chunk.retained_at if self.state_bytes else ():
            index, rest = divmod(position, BLOCK_TOKENS)
            if not rest and 0 < index <= len(ids):
                block = ids[index - 1]
                written += self._put(
                    owner, state_id(block), ObjectKind.STATE, self.state_bytes, block, position
                )
        self.catalog.take_dropped()
        return written

    def release(self, owner: str) -> None:
        self.catalog.release(owner)
        self.catalog.take_dropped()

    def _put(
        self, owner: str, id_: bytes, kind: ObjectKind, size: int, parent: bytes, position: int
    ) -> int:
        if self.catalog.adopt(id_, owner=owner, ttl_s=_LEASE_S, rolling=False):
            return 0
        try:
            reservation = self.catalog.reserve(id_, kind, size)
        except OverloadedError:
            self.refused += 1
            return 0
        self.catalog.commit(
            reservation,
            digest=b"",
            owner=owner,
            ttl_s=_LEASE_S,
            rolling=False,
            parent=parent,
            position=position,
        )
        return size


def state_id(block: bytes) -> bytes:
    return hashlib.blake2b(block, digest_size=32, person=b"state").digest()


def unique_bytes(trace: Trace, costs: Costs) -> int:
    """Bytes that a store which never evicts would hold after the whole trace."""
    store = SimStore(costs, capacity_bytes=None, eviction=Eviction.LRU, clock=lambda: 0.0)
    for request in trace.requests:
        retained = retained_positions(request.prompt_tokens)
        store.publish("", request, Chunk(0, request.prompt_tokens, retained))
    return store.catalog.usage().used_bytes
