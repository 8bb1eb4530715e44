"""Process groups between the ranks of one replica: torch.distributed without its global state."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from model.grid import Grid
from model.ranks.communicator import Communicator, Exchange, Single

# torch's stubs lack most of these names.
_c10d: Any = dist
_more: Any = distributed_c10d
# A rank that ends is noticed at once, by its connections.
_PATIENCE = timedelta(days=1)


@dataclass(frozen=True)
class Meeting:
    """Where the ranks find one another: rank 0's store."""

    store: Any
    timeout_s: float


def host_meeting(host: str, *, timeout_s: float) -> tuple[Meeting, int]:
    """Rank 0's part: the store and its port, which listens on `host` and nowhere else."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.bind((host, 0))
    listening.listen()
    port = listening.getsockname()[1]
    store = _c10d.TCPStore(
        host,
        port,
        is_master=True,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
        # Given only a host, the store would listen on every address of the machine.
        master_listen_fd=listening.detach(),
    )
    return Meeting(store, timeout_s), port


def join_meeting(host: str, port: int, *, timeout_s: float) -> Meeting:
    """Another rank's part. Raises `RuntimeError` if rank 0's store is not there in time."""
    timeout = timedelta(seconds=timeout_s)
    return Meeting(_c10d.TCPStore(host, port, timeout=timeout, wait_for_workers=False), timeout_s)


def connect(grid: Grid, meeting: Meeting, *, address: str) -> Communicator:
    """This rank's groups, once all ranks are there; raises `RuntimeError` after the timeout.

    `address` is this rank's own address, over which the others reach it.
    """
    plane: Exchange = Single()
    tensor: Exchange = Single()
    planes: Exchange = Single()
    if grid.plane > 1:
        plane = _Group(f"plane{grid.cp_rank}", grid.plane_rank, grid.plane, meeting, address)
    if grid.ep == 1:
        tensor = plane
    elif grid.tp > 1:
        name = f"tensor{grid.cp_rank}.{grid.ep_rank}"
        tensor = _Group(name, grid.tp_rank, grid.tp, meeting, address)
    if grid.cp > 1:
        planes = _Group(f"line{grid.plane_rank}", grid.cp_rank, grid.cp, meeting, address)
    return Communicator(grid, plane=plane, tensor=tensor, planes=planes)


class _Group:
    """gloo between the ranks of one group, with a finite timeout on every call."""

    def __init__(self, name: str, rank: int, size: int, meeting: Meeting, address: str) -> None:
        self.size = size
        options = _c10d.ProcessGroupGloo._Options()
        # Without a device of its own gloo looks the machine's name up and may listen anywhere.
        options._devices = [_c10d.ProcessGroupGloo.create_device(hostname=address)]
        options._timeout = timedelta(seconds=meeting.timeout_s)
        store = _c10d.PrefixStore(name, meeting.store)
        self._group: Any = _c10d.ProcessGroupGloo(store, rank, size, options)

    @property
    def _live(self) -> Any:
        if self._group is None:
            raise RuntimeError("this group of ranks is closed")
        return self._group

    def all_gather(self, x: Tensor, *, patient: bool = False) -> list[Tensor]:
        found = [torch.empty_like(x) for _ in range(self.size)]
        options = _more.AllgatherOptions()
        if patient:
            options.timeout = _PATIENCE
        self._live.allgather([found], [x], options).wait()
        return found

    def close(self) -> None:
        # Dropping the group closes its connections, and so wakes whoever waits for this rank.
        self._group = None
