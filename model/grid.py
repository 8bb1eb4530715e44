"""`Grid`: how one replica is cut over ranks, and which place this rank has. Torch-free.

A replica has `cp` planes of `tp * ep` ranks. Inside a plane attention heads and outputs are
cut over all `tp * ep` ranks, routed experts over `ep`, and every expert's outputs over `tp`. Planes
share the rows of a prefill chunk between them (deepseek-v4.md 8, "Context parallel"); each holds
the whole cache, because there is one KV head (T23).

`cp` moves rows, it never splits a sum: in numerics class `exact` it changes no stored number, so it
is no part of the fingerprint, while `tp` and `ep` are.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Grid:
    """Degrees of the parallel layout and this rank's number in it (0 .. world - 1)."""

    tp: int = 1
    ep: int = 1
    cp: int = 1
    rank: int = 0

    def __post_init__(self) -> None:
        if min(self.tp, self.ep, self.cp) < 1 or not 0 <= self.rank < self.world:
            raise ValueError(f"impossible grid: {self}")

    @property
    def world(self) -> int:
        return self.tp * self.ep * self.cp

    @property
    def plane(self) -> int:
        """Ranks that share every row's work: heads and output groups are cut by this."""
        return self.tp * self.ep

    @property
    def plane_rank(self) -> int:
        return self.rank % self.plane

    @property
    def tp_rank(self) -> int:
        return self.rank % self.tp

    @property
    def ep_rank(self) -> int:
        return self.rank // self.tp % self.ep

    @property
    def cp_rank(self) -> int:
        return self.rank // self.plane
