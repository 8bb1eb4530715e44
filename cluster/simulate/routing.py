"""The router of serving under the virtual clock: its board, its policies, its charges, its memory
of what it routed.

One front routes for the whole cluster, so its own charges are the whole load, and what it knows of
the store is exact, as a mirror's that has heard every event.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from cluster.contracts import WorkerView
from cluster.policy import (
    NO_LOAD,
    PREFILL,
    Coefficients,
    Resident,
    Route,
    RoutingPolicy,
    Shape,
)
from cluster.routing.board import Board
from cluster.routing.charge import Charged
from cluster.routing.choice import open_policy
from cluster.routing.routed import WORTH_WAITING_TOKENS, InFlight, Reading, Seen
from cluster.simulate.costs import Costs
from cluster.simulate.life import Life
from cluster.simulate.store import SimStore

_FINGERPRINT = bytes(32)
_LEAST_SEQUENCE_S = 1e-6
"""A router that was told that company costs nothing would fill one worker's slots before it looks
at the next."""


@dataclass
class _Routed:
    charged: Charged
    reading: Reading | None = None


class SimRouter:
    """Charges are those of `cluster.router`: taken at the decision, less with progress."""

    def __init__(self, policy: RoutingPolicy, costs: Costs, store: SimStore) -> None:
        self._policy = open_policy(policy)
        self._overlap = policy is RoutingPolicy.BLOCK_OVERLAP
        self._costs = costs
        self._store = store
        self._board = Board()
        self._routed: dict[Life, _Routed] = {}
        self._in_flight = InFlight()
        self._seen = Seen()

    def show(self, workers: Iterable[tuple[str, str, bool]]) -> None:
        """The pools have changed: (name, role, draining) of each worker."""
        views = [self._view(*worker) for worker in workers]
        costs = self._costs
        known = Coefficients(
            token_s=1 / costs.prefill_tokens_per_s,
            pair_s=costs.prefill_context_s,
            fetch_bytes_per_s=costs.fetch_bytes_per_s,
            step_s=costs.decode_step_s,
            sequence_s=max(costs.decode_stream_s, _LEAST_SEQUENCE_S),
        )
        coefficients = {view.worker_id: known for view in views}
        others = dict.fromkeys(coefficients, NO_LOAD)
        self._board.show(views, coefficients=coefficients, others=others)

    def route(self, life: Life) -> Route:
        """Raises WorkerUnavailableError if a role has no worker that takes new work."""
        request = life.request
        resident = self._resident(life)
        shape = Shape(request.prompt_tokens, max(0, life.reserve_tokens - request.prompt_tokens))
        decision = self._policy.choose(self._board, shape, resident)
        self._board.turn += 1
        routed = _Routed(Charged(self._board, decision.route, shape, resident))
        worker = decision.route.prefill.worker_id
        if self._is_long(request.prompt_tokens - resident.resumable_tokens):
            routed.reading = self._in_flight.begin(worker, request.blocks)
        if self._overlap:
            self._seen.note(worker, request.blocks)
        self._routed[life] = routed
        return decision.route

    def read(self, life: Life, tokens_done: int) -> None:
        """So many tokens of its prompt are ready, restored ones included."""
        self._routed[life].charged.read(tokens_done)

    def answering(self, life: Life) -> None:
        """Its first token is there."""
        routed = self._routed[life]
        routed.charged.answering()
        self._has_read(routed)

    def ended(self, life: Life) -> None:
        """May be called for one that was never routed."""
        routed = self._routed.pop(life, None)
        if routed is not None:
            routed.charged.close()
            self._has_read(routed)

    @property
    def held(self) -> int:
        """Workers that anything is charged to, and blocks that count as being read."""
        return len(self._board.charged) + len(self._in_flight)

    def _resident(self, life: Life) -> Resident:
        blocks = life.request.blocks
        resumable, matched = self._store.resumable(life.request)
        resident = Resident(
            resumable_tokens=resumable,
            fetch_bytes=self._costs.size_bytes(resumable) if resumable else 0,
            overlap_tokens=matched,
        )
        if self._overlap:
            return replace(resident, seen=self._seen.seen(blocks))
        if self._is_long(life.request.prompt_tokens - resumable):
            return resident.with_near(self._in_flight.near(blocks))
        return resident

    def _is_long(self, new_tokens: int) -> bool:
        return new_tokens >= WORTH_WAITING_TOKENS

    def _has_read(self, routed: _Routed) -> None:
        if routed.reading is not None:
            self._in_flight.end(routed.reading)
            routed.reading = None

    def _view(self, name: str, role: str, draining: bool) -> WorkerView:
        costs = self._costs
        memory = costs.prefill_memory_bytes if role == PREFILL else costs.decode_memory_bytes
        return WorkerView(
            worker_id=name,
            role=role,
            address=name,
            pid=0,
            running=0,
            queued=0,
            queued_tokens=0,
            capacity_bytes=memory,
            used_bytes=0,
            draining=draining,
            fingerprint=_FINGERPRINT,
            max_model_len=costs.max_context,
            bytes_per_token=costs.bytes_per_token,
            metrics={},
        )
