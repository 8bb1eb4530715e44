"""`Communicator`: what a rank says to the others in the middle of a forward.

Rows and columns move, sums do not: inside a plane the ranks' columns are put side by side, between
planes rows are (`model.grid`). What is added up afterwards every rank adds alike, so a result
depends neither on the batch nor on timing nor on the transport. A group of one rank moves nothing,
so one rank runs the same code.

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

    def close(self) -> None:
        """May be called again. Ends waiting calls of the other members with an error."""


class Single:
    """A group of one."""

    size = 1

    def all_gather(self, x: Tensor, *, patient: bool = False) -> list[Tensor]:
        return [x]

    def close(self) -> None:
        return


class Communicator:
    """The groups that one rank belongs to: its plane, those of the plane that hold the same
    experts, and the ranks at its place in every plane.
    """

    def __init__(self, grid: Grid, *, plane: Exchange, tensor: Exchange, planes: Exchange) -> None:
        if (plane.size, tensor.size, planes.size) != (grid.plane, grid.tp, grid.cp):
            sizes = f"{plane.size}, {tensor.size} and {planes.size}"
            raise ValueError(f"groups of {sizes} ranks for {grid}")
        self.grid = grid
        self._plane, self._tensor, self._planes = plane, tensor, planes

    def gather_plane(self, *parts_RN: Tensor) -> list[tuple[Tensor, ...]]:
        """Every rank's parts, by rank; alike in shape and type on all of them. One message."""
        return _gather(self._plane, parts_RN)

    def join_plane(self, *parts_RN: Tensor) -> tuple[Tensor, ...]:
        """For each part the plane's columns side by side, in rank order. One message."""
        if self.grid.plane == 1:
            return parts_RN
        found = zip(*self.gather_plane(*parts_RN), strict=True)
        return tuple(torch.cat(columns, -1) for columns in found)

    def join_tensor(self, part_RN: Tensor) -> Tensor:
        """The columns of the ranks that hold the same experts, in rank order."""
        if self.grid.tp == 1 or not part_RN.numel():
            return part_RN
        return torch.cat(self._tensor.all_gather(part_RN.contiguous()), -1)

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
        for group in (self._plane, self._tensor, self._planes):
            group.close()


def _gather(group: Exchange, parts: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
    if len(parts) == 1:
        return [(found,) for found in group.all_gather(parts[0].contiguous())]
    told = group.all_gather(torch.cat([part.reshape(-1) for part in parts]))
    sizes = [part.numel() for part in parts]
    return [
        tuple(x.view(part.shape) for x, part in zip(torch.split(flat, sizes), parts, strict=True))
        for flat in told
    ]


def alone() -> Communicator:
    """One rank, no others."""
    return Communicator(Grid(), plane=Single(), tensor=Single(), planes=Single())
