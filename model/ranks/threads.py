"""Ranks as threads of one process: the fake of the transport, for tests."""

from __future__ import annotations

import threading

from torch import Tensor

from model.grid import Grid
from model.ranks.communicator import Communicator

_TIMEOUT_S = 60.0


class _Table:
    """Where the members of a group lay down their tensors for one another."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.slots: list[Tensor | None] = [None] * size
        self.barrier = threading.Barrier(size, timeout=_TIMEOUT_S)


class _Member:
    def __init__(self, table: _Table, rank: int) -> None:
        self._table, self._rank = table, rank

    @property
    def size(self) -> int:
        return self._table.size

    def all_gather(self, x: Tensor, *, patient: bool = False) -> list[Tensor]:
        self._table.slots[self._rank] = x
        self._table.barrier.wait()
        found = [slot.clone() for slot in self._table.slots if slot is not None]
        # Nobody may change its tensor, or lay down the next one, before all have copied.
        self._table.barrier.wait()
        return found

    def close(self) -> None:
        self._table.barrier.abort()


def thread_ranks(*, tp: int = 1, ep: int = 1, cp: int = 1) -> list[Communicator]:
    """Communicators of all ranks of a grid; each is used by a thread of its own.

    A rank that is closed ends the others' calls with `threading.BrokenBarrierError`, a
    `RuntimeError`, as a lost process does.
    """
    grids = [Grid(tp, ep, cp, rank) for rank in range(tp * ep * cp)]
    plane_tables = [_Table(tp * ep) for _ in range(cp)]
    tensor_tables = [[_Table(tp) for _ in range(ep)] for _ in range(cp)]
    line_tables = [_Table(cp) for _ in range(tp * ep)]
    return [
        Communicator(
            grid,
            plane=_Member(plane_tables[grid.cp_rank], grid.plane_rank),
            tensor=_Member(tensor_tables[grid.cp_rank][grid.ep_rank], grid.tp_rank),
            planes=_Member(line_tables[grid.plane_rank], grid.cp_rank),
        )
        for grid in grids
    ]
