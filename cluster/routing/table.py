"""`Choice`: a decision that can still be explained later, row by row."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

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


@dataclass(frozen=True, eq=False, slots=True)
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


def able(board: Board, avoid: frozenset[str]) -> Sequence[Group]:
    """The groups without those to avoid, as far as they have a worker of each role then.

    Raises `WorkerUnavailableError` if none has.
    """
    groups = board.groups
    if avoid:
        groups = tuple(
            Group(g.fingerprint, g.prefill.without(avoid), g.decode.without(avoid)) for g in groups
        )
        groups = tuple(g for g in groups if g.prefill.workers and g.decode.workers)
    if not groups:
        raise board.missing(avoid)
    return groups
