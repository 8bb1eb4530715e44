"""The policies that others route by, to be compared with `cost`. They look at the same board.

Each picks the fingerprint group of its first choice, so both workers belong together.
"""

from __future__ import annotations

from collections.abc import Sequence

from cluster.policy import NOBODY, Resident, Route, RoutingPolicy, Shape
from cluster.routing.board import Board, Columns, Group
from cluster.routing.table import Choice, Parts, ToParts, able
from penstock.blocks import BLOCK_TOKENS


class RoundRobin:
    """Everyone in turn, whatever they have to do."""

    def choose(
        self, board: Board, shape: Shape, resident: Resident, *, avoid: frozenset[str] = NOBODY
    ) -> Choice:
        turn = board.turn

        def next_of(places: Sequence[int]) -> int:
            return places[turn % len(places)]

        found = able(board, avoid)
        # By turns among all prefill workers of all groups, then within the group.
        every = [(group, at, decodes) for group, prefills, decodes in found for at in prefills]
        group, at, decodes = every[turn % len(every)]
        to = next_of(decodes)
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
        def prefill(columns: Columns, i: int) -> Parts:
            before = tokens[columns.workers[i].worker_id]
            return Parts({"tokens": before, "prompts": columns.count[i] / _MANY})

        tokens = _tokens(board)
        decode = _decode_load(shape)
        picked = _pick(able(board, avoid), prefill, decode)
        return _choice(
            RoutingPolicy.LEAST_LOAD, "tokens", board, shape, resident, avoid,
            picked, (prefill, decode),
        )  # fmt: skip


class BlockOverlap:
    """Prefill: fewest blocks to compute where the longest run of blocks has been seen, plus the
    blocks before it; states are not looked at. Decode as `least-load`.
    """

    def choose(
        self, board: Board, shape: Shape, resident: Resident, *, avoid: frozenset[str] = NOBODY
    ) -> Choice:
        def prefill(columns: Columns, i: int) -> Parts:
            worker_id = columns.workers[i].worker_id
            seen = min(resident.seen.get(worker_id, 0), shape.prompt_tokens)
            return Parts(
                {
                    "to_compute": (shape.prompt_tokens - seen) / BLOCK_TOKENS,
                    "before": tokens[worker_id] / BLOCK_TOKENS,
                },
                {"overlap_tokens": seen},
            )

        tokens = _tokens(board)
        decode = _decode_load(shape)
        picked = _pick(able(board, avoid), prefill, decode)
        return _choice(
            RoutingPolicy.BLOCK_OVERLAP, "blocks", board, shape, resident, avoid,
            picked, (prefill, decode),
        )  # fmt: skip


_MANY = float(1 << 20)
"""Makes a count the second key of a sum: nothing has so many prompts."""


def _tokens(board: Board) -> dict[str, float]:
    """Tokens before a new prompt, as of now, by worker id."""
    return {
        worker.worker_id: max(0.0, float(board.load(worker.worker_id).tokens))
        for group in board.groups
        for worker in group.prefill.workers
    }


def _decode_load(shape: Shape) -> ToParts:
    def parts(columns: Columns, i: int) -> Parts:
        worker = columns.workers[i]
        need = shape.total_tokens * worker.bytes_per_token
        used = worker.capacity_bytes - columns.free_bytes[i]
        full = used + need > worker.capacity_bytes
        return Parts(
            {
                "no_room": _MANY if full else 0.0,
                "sequences": float(columns.count[i]),
                "used": min(used / worker.capacity_bytes, 1e3) / _MANY,
            }
        )

    return parts


def _pick(
    found: list[tuple[Group, Sequence[int], Sequence[int]]], prefill: ToParts, decode: ToParts
) -> tuple[Group, int, int]:
    """The group with the best decode worker (it has the scarcer thing, memory), then its prefill
    worker.
    """
    best = None
    for group, prefills, decodes in found:
        to = min(decodes, key=lambda i: decode(group.decode, i).total)
        least = decode(group.decode, to).total
        if best is None or least < best[0]:
            best = (least, group, prefills, to)
    assert best is not None, "`able` returns at least one group"
    _, group, prefills, to = best
    at = min(prefills, key=lambda i: prefill(group.prefill, i).total)
    return group, at, to


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
