"""`Communicator`: what a rank says to the others in the middle of a forward.

Three things move: partial sums inside a plane, slices of the logits inside a plane, and rows
between planes (`model.grid`). A group of one rank moves nothing, so one rank runs the same code.

Order is fixed: a sum adds the ranks' parts in the order of their numbers, element by element, so it
does not depend on the batch, on timing or on the transport, and every rank gets the same bits.
Class `fast` leaves the order to the transport.

Shape suffixes: R rows, N columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from model.grid import Grid


class Exchange(Protocol):
    """One group of ranks and its transport. Every member makes the same calls in the same order.

    A call raises `RuntimeError` within the group's timeout if a member is gone or does not come.
    """

    @property
    def size(self) -> int: ...

    def all_gather(self, x: Tensor, *, patient: bool = False) -> list[Tensor]:
        """Everybody's `x` (alike in shape and type), by rank. `x` is only read.

        `patient`: wait for as long as the others live.
        """

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over all ranks, in any order."""

    def close(self) -> None:
        """May be called again. Ends waiting calls of the other members with an error."""


class Single:
    """A group of one."""

    size = 1

    def all_gather(self, x: Tensor, *, patient: bool = False) -> list[Tensor]:
        return [x]

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def close(self) -> None:
        return


class Communicator:
    """The groups that one rank belongs to: its plane, and the ranks at its place in every plane."""

    def __init__(
        self, grid: Grid, *, plane: Exchange, planes: Exchange, in_order: bool = True
    ) -> None:
        if (plane.size, planes.size) != (grid.plane, grid.cp):
            raise ValueError(f"groups of {plane.size} and {planes.size} ranks for {grid}")
        self.grid = grid
        self._plane, self._planes = plane, planes
        self._in_order = in_order

    def sum_plane(self, part: Tensor) -> Tensor:
        """Sum of the plane's parts, added in fp32 in rank order, in the type of `part`."""
        if self.grid.plane == 1:
            return part
        if not self._in_order:
            return self._plane.all_reduce(part)
        first, *others = self._plane.all_gather(part.contiguous())
        total = first.to(torch.float32, copy=True)
        for other in others:
            total += other
        return total.to(part.dtype)

    def join_plane(self, part_RN: Tensor) -> Tensor:
        """The plane's columns side by side, in rank order."""
        if self.grid.plane == 1:
            return part_RN
        return torch.cat(self._plane.all_gather(part_RN.contiguous()), -1)

    def plane_numbers(self, mine: Sequence[int]) -> list[tuple[int, ...]]:
        """What every rank of the plane tells, by rank: equally many numbers of 0 .. 2^64 - 1.

        For loading, where one rank may be far behind the others.
        """
        raw = b"".join(number.to_bytes(8, "little") for number in mine)
        told = self._plane.all_gather(
            torch.frombuffer(bytearray(raw), dtype=torch.uint8), patient=True
        )
        found = [bytes(part.tolist()) for part in told]
        places = range(0, len(raw), 8)
        return [tuple(int.from_bytes(p[at : at + 8], "little") for at in places) for p in found]

    def gather_planes(self, rows: Tensor, counts: Sequence[int]) -> list[Tensor]:
        """Every plane's rows; plane i has `counts[i]` of them (known to all, so none is sent)."""
        if self.grid.cp == 1:
            return [rows]
        most = max(counts)
        if not most:
            return [rows[:0]] * self.grid.cp
        padded = rows.new_zeros((most, *rows.shape[1:]))
        padded[: rows.shape[0]] = rows
        found = self._planes.all_gather(padded)
        return [part[:count] for part, count in zip(found, counts, strict=True)]

    def close(self) -> None:
        self._plane.close()
        self._planes.close()


def alone() -> Communicator:
    """One rank, no others."""
    return Communicator(Grid(), plane=Single(), planes=Single())
