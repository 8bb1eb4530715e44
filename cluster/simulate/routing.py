"""The router of serving under the virtual clock: its board, its policies, its charges.

One front routes for the whole cluster, so its own charges are the whole load, and what it knows of
the store is exact, as a mirror's that has heard every event.
"""

from __future__ import annotations

from collections.abc import Iterable

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
from cluster.simulate.costs import Costs
from cluster.simulate.life import Life
from cluster.simulate.store import SimStore

_FINGERPRINT = bytes(32)
_SEEN_WORKERS = 8
"""Workers remembered for each block."""


class SimRouter:
    """Charges are those of `cluster.router`: taken at the decision, less with progress."""

    def __init__(self, policy: RoutingPolicy, costs: Costs, store: SimStore) -> None:
        self._policy = open_policy(policy)
        self._overlap = policy is RoutingPolicy.BLOCK_OVERLAP
        self._costs = costs
        self._store = store
        self._board = Board()
        self._charged: dict[Life, Charged] = {}
        self._seen: dict[bytes, dict[str, None]] = {}

    def show(self, workers: Iterable[tuple[str, str, bool]]) -> None:
        """The pools have changed: (name, role, draining) of each worker."""
        views = [self._view(*worker) for worker in workers]
        costs = self._costs
        known = Coefficients(
            token_s=1 / costs.prefill_tokens_per_s,
            pair_s=costs.prefill_context_s,
            fetch_bytes_per_s=costs.fetch_bytes_per_s,
            step_s=costs.decode_step_s,
            sequence_s=costs.decode_stream_s,
        )
        coefficients = {view.worker_id: known for view in views}
        others = dict.fromkeys(coefficients, NO_LOAD)
        self._board.show(views, coefficients=coefficients, others=others)

    def route(self, life: Life) -> Route:
        """Raises WorkerUnavailableError if a role has no worker that takes new work."""
        request = life.request
        resumable, matched = self._store.resumable(request)
        resident = Resident(
            resumable_tokens=resumable,
            fetch_bytes=self._costs.size_bytes(resumable) if resumable else 0,
            overlap_tokens=matched,
            seen=self._seen_by(life) if self._overlap else {},
        )
        shape = Shape(request.prompt_tokens, max(0, life.reserve_tokens - request.prompt_tokens))
        decision = self._policy.choose(self._board, shape, resident)
        self._board.turn += 1
        self._charged[life] = Charged(self._board, decision.route, shape, resident)
        if self._overlap:
            self._note(life, decision.route.prefill.worker_id)
        return decision.route

    def read(self, life: Life, tokens_done: int) -> None:
        """So many tokens of its prompt are ready, restored ones included."""
        self._charged[life].read(tokens_done)

    def answering(self, life: Life) -> None:
        """Its first token is there."""
        self._charged[life].answering()

    def ended(self, life: Life) -> None:
        """May be called for one that was never routed."""
        charged = self._charged.pop(life, None)
        if charged is not None:
            charged.close()

    @property
    def charged(self) -> int:
        """Workers that anything is charged to."""
        return len(self._board.charged)

    def _note(self, life: Life, worker: str) -> None:
        for id_ in life.request.blocks:
            seen = self._seen.setdefault(id_, {})
            seen.pop(worker, None)
            seen[worker] = None
            if len(seen) > _SEEN_WORKERS:
                del seen[next(iter(seen))]

    def _seen_by(self, life: Life) -> dict[str, int]:
        """Leading tokens of the prompt that each worker was given before."""
        found: dict[str, int] = {}
        ids = life.request.blocks
        still = set(self._seen.get(ids[0], ())) if ids else set()
        for index, id_ in enumerate(ids):
            still &= self._seen.get(id_, {}).keys()
            if not still:
                break
            found |= dict.fromkeys(still, (index + 1) * self._store.block_tokens)
        return found

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
