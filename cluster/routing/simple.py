"""The policies that others route by, to be compared with `cost`. They look at the same board.

Each picks the fingerprint group of its first choice, so both workers belong together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from cluster.policy import NOBODY, Resident, Route, RoutingPolicy, Shape
from cluster.routing.board import Board, Columns, Group
from cluster.routing.table import Choice, Parts, ToParts, able
from penstock.blocks import BLOCK_TOKENS


class RoundRobin:
    """Everyone in turn, whatever they have to do."""

    def choose(
        self, board: Board, shape: Shape, resident: Resident, *, avoid: frozenset[str] = NOBODY
    ) -> Choice:
        # By turns among all prefill workers of all groups, then within the group.
        every = [(group, at) for group in able(board, avoid) for at in group.prefill.places]
        group, at = every[board.turn % len(every)]
        to = board.turn % len(group.decode.workers)
        numbers = {
            group.prefill.workers[at].worker_id: 0.0,
            group.decode.workers[to].worker_id: 0.0,
        }

        def parts(columns: Columns, i: int) -> Parts:
            return Parts({"not_its_turn": numbers.get(columns.workers[i].worker_id, 1.0)})

        return _choice(
            RoutingPolicy.ROUND_ROBIN, "turns", board, shape, resident, avoid,
            (group, at, to), (parts, parts),
        )  # fmt: skip


class LeastLoad:
    """Prefill: fewest tokens before it, then fewest prompts. Decode: room, then the smaller batch,
    then the emptier cache.
    """

    def choose(
        self, board: Board, shape: Shape, resident: Resident, *, avoid: frozenset[str] = NOBODY
    ) -> Choice:
        def prefill(columns: Columns, i: int) -> float:
            return columns.tokens[i] + columns.count[i] / _MANY

        def prefill_parts(columns: Columns, i: int) -> Parts:
            return Parts({"tokens": columns.tokens[i], "prompts": columns.count[i] / _MANY})

        picked = _pick(able(board, avoid), prefill, shape)
        return _choice(
            RoutingPolicy.LEAST_LOAD, "tokens", board, shape, resident, avoid,
            picked, (prefill_parts, partial(_decode_parts, shape)),
        )  # fmt: skip


class BlockOverlap:
    """Prefill: fewest blocks to compute where the longest run of blocks has been seen, plus the
    blocks before it; states are not looked at. Decode as `least-load`.
    """

    def choose(
        self, board: Board, shape: Shape, resident: Resident, *, avoid: frozenset[str] = NOBODY
    ) -> Choice:
        prompt, seen = shape.prompt_tokens, resident.seen

        def overlap(columns: Columns, i: int) -> int:
            return min(seen.get(columns.workers[i].worker_id, 0), prompt)

        def prefill(columns: Columns, i: int) -> float:
            return (prompt - overlap(columns, i)) / BLOCK_TOKENS + columns.tokens[i] / BLOCK_TOKENS

        def prefill_parts(columns: Columns, i: int) -> Parts:
            shared = overlap(columns, i)
            return Parts(
                {
                    "to_compute": (prompt - shared) / BLOCK_TOKENS,
                    "before": columns.tokens[i] / BLOCK_TOKENS,
                },
                {"overlap_tokens": shared},
            )

        picked = _pick(able(board, avoid), prefill, shape)
        return _choice(
            RoutingPolicy.BLOCK_OVERLAP, "blocks", board, shape, resident, avoid,
            picked, (prefill_parts, partial(_decode_parts, shape)),
        )  # fmt: skip


_MANY = float(1 << 20)
"""Makes a count the second key of a sum: nothing has so many prompts."""


def _decode(columns: Columns, i: int, need_bytes: float) -> tuple[float, float, float]:
    """No room, sequences, share in use: the parts of a decode worker's cost."""
    capacity, free = columns.workers[i].capacity_bytes, columns.free_bytes[i]
    used = min((capacity - free) / capacity, 1e3) / _MANY
    return (_MANY if need_bytes > free else 0.0), float(columns.count[i]), used


def _decode_parts(shape: Shape, columns: Columns, i: int) -> Parts:
    need_bytes = shape.total_tokens * columns.workers[i].bytes_per_token
    no_room, sequences, used = _decode(columns, i, need_bytes)
    return Parts({"no_room": no_room, "sequences": sequences, "used": used})


def _pick(
    found: Sequence[Group],
    prefill: Callable[[Columns, int], float],
    shape: Shape,
) -> tuple[Group, int, int]:
    """The group with the best decode worker (it has the scarcer thing, memory), then its prefill
    worker.
    """
    best = None
    for group in found:
        columns = group.decode
        need_bytes = shape.total_tokens * columns.workers[0].bytes_per_token
        costs = [sum(_decode(columns, i, need_bytes)) for i in columns.places]
        least = min(costs)
        if best is None or least < best[0]:
            best = (least, group, costs.index(least))
    assert best is not None, "`able` returns at least one group"
    _, group, to = best
    costs = [prefill(group.prefill, i) for i in group.prefill.places]
    return group, costs.index(min(costs)), to


def _choice(
    policy: RoutingPolicy,
    unit: str,
    board: Board,
    shape: Shape,
    resident: Resident,
    avoid: frozenset[str],
    picked: tuple[Group, int, int],
    parts: tuple[ToParts, ToParts],
) -> Choice:
    group, at, to = picked
    return Choice(
        policy=policy,
        route=Route(group.prefill.workers[at], group.decode.workers[to]),
        unit=unit,
        shape=shape,
        resident=resident,
        groups=tuple(g.snapshot() for g in board.groups),
        out=board.out,
        avoid=avoid,
        prefill_parts=parts[0],
        decode_parts=parts[1],
    )
