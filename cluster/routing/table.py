"""`Choice`: a decision that can still be explained later, row by row."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from cluster.contracts import WorkerView
from cluster.policy import DECODE, PREFILL, Cost, Resident, Route, RoutingPolicy, Shape
from cluster.routing.board import Board, Columns, Group, Out


@dataclass(frozen=True)
class Parts:
    """Of one worker's cost: what adds up to it, in this order, and what it was made from."""

    added: Mapping[str, float]
    facts: Mapping[str, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        return sum(self.added.values())


ToParts = Callable[[Columns, int], Parts]


@dataclass(frozen=True)
class Choice:
    """`cluster.policy.Decision`. Holds the columns as they were: the table is made when asked for,
    by the same sums that chose.
    """

    policy: RoutingPolicy
    route: Route
    unit: str
    shape: Shape
    resident: Resident
    groups: tuple[Group, ...]
    out: tuple[Out, ...]
    avoid: frozenset[str]
    prefill_parts: ToParts
    decode_parts: ToParts

    def table(self) -> Sequence[Cost]:
        rows = [Cost(o.worker.worker_id, o.worker.role, 0.0, {}, {}, o.reason) for o in self.out]
        for group in self.groups:
            other = group.fingerprint != self.route.prefill.fingerprint
            rows += _rows(PREFILL, group.prefill, self.prefill_parts, self.avoid, other)
            rows += _rows(DECODE, group.decode, self.decode_parts, self.avoid, other)
        return sorted(rows, key=lambda row: (row.role != PREFILL, row.worker_id))

    def chosen(self, role: str) -> Cost:
        """The row of the worker that was chosen for `role`."""
        worker = self.route.prefill if role == PREFILL else self.route.decode
        return next(row for row in self.table() if row.worker_id == worker.worker_id)


def _rows(
    role: str, columns: Columns, parts: ToParts, avoid: frozenset[str], other: bool
) -> list[Cost]:
    rows = []
    for at, worker in enumerate(columns.workers):
        if worker.worker_id in avoid:
            rows.append(Cost(worker.worker_id, role, 0.0, {}, {}, "avoided"))
            continue
        found = parts(columns, at)
        barred = "other fingerprint" if other else ""
        rows.append(Cost(worker.worker_id, role, found.total, found.added, found.facts, barred))
    return rows


def able(board: Board, avoid: frozenset[str]) -> list[tuple[Group, Sequence[int], Sequence[int]]]:
    """The groups with the places of those workers that may be chosen; both are never empty.

    Raises `WorkerUnavailableError` if there is no such group.
    """
    found: list[tuple[Group, Sequence[int], Sequence[int]]] = []
    for group in board.groups:
        prefills = _places(group.prefill.workers, avoid)
        decodes = _places(group.decode.workers, avoid)
        if prefills and decodes:
            found.append((group, prefills, decodes))
    if not found:
        raise board.missing(avoid)
    return found


def _places(workers: Sequence[WorkerView], avoid: frozenset[str]) -> Sequence[int]:
    every = range(len(workers))
    return [at for at in every if workers[at].worker_id not in avoid] if avoid else every
