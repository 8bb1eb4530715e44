"""Rank 0's view of the other ranks of its replica: started, told every call, watched. Torch-free.

A rank that is lost ends the replica: its part of the weights and of every sequence is gone. So the
first failure kills the rest, every later call says so, and the worker is replaced.
"""

from __future__ import annotations

import logging
import select
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict

from model.engine import Buffer
from model.grid import Grid
from model.ranks.handshake import Door
from model.ranks.message import Channel
from penstock.child import ChildProcess
from penstock.errors import ModelLoadError, PenstockError, WorkerUnavailableError
from penstock.worker import ModelSpec, RankSpec

_log = logging.getLogger(__name__)
_ARRIVAL_TIMEOUT_S = 180.0
# A large part may take many minutes to read; a rank that stands still must not hold up the start.
_LOAD_TIMEOUT_S = 3600.0
_POLL_S = 0.1
# A rank that broke off a step has a cause of its own, or is about to end for one.
_CAUSE_WAIT_S = 2.0


class Order(BaseModel):
    """A follower's start. It holds a secret: pass it by stdin or a call, never argv."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str
    port: int
    token: str
    rank: int
    ranks: RankSpec
    model: ModelSpec

    @property
    def grid(self) -> Grid:
        return Grid(self.ranks.tensor, self.ranks.expert, self.ranks.context, self.rank)


class RankProcess(Protocol):
    """One follower as its starter knows it. Methods may be called from any thread."""

    def ended(self) -> str | None:
        """How it ended, None while it runs."""

    def stop(self) -> None:
        """Ends it now; may be called again."""


class RankStarter(Protocol):
    def __call__(self, order: Order) -> RankProcess:
        """Start the follower of this order without waiting for it."""


class ChildRank:
    """A follower as a child process on this process's leash."""

    def __init__(self, order: Order) -> None:
        self._child = ChildProcess(
            f"rank {order.rank}", "model.ranks", first_line=order.model_dump_json()
        )
        self._child.spawn()

    @property
    def pid(self) -> int | None:
        return self._child.pid

    def ended(self) -> str | None:
        if self._child.running:
            return None
        return self._child.last_words or f"status {self._child.poll()}"

    def stop(self) -> None:
        # It keeps nothing that would have to be put away.
        self._child.kill()
        self._child.stop()


class Followers:
    """Ranks 1 .. world - 1. `tell`, `lost` and `close` belong to the engine's thread."""

    def __init__(self, spec: ModelSpec, ranks: RankSpec, *, host: str, start: RankStarter) -> None:
        """Starts them all and lets them in. Raises `PenstockError` if one does not come."""
        self._ranks = ranks
        self._loss: str | None = None
        self._processes: dict[int, RankProcess] = {}
        self._channels: dict[int, Channel] = {}
        door = Door(host)
        try:
            for rank in range(1, ranks.world):
                order = Order(
                    host=host, port=door.port, token=door.token, rank=rank, ranks=ranks, model=spec
                )
                self._processes[rank] = start(order)
            wanted = set(self._processes)
            self._channels = door.admit(
                wanted, timeout_s=_ARRIVAL_TIMEOUT_S, alive=self._require_running
            )
        except BaseException:
            self.close()
            raise
        finally:
            door.close()
        for channel in self._channels.values():
            channel.set_timeout(ranks.timeout_s)

    def check(self) -> None:
        """Raises WorkerUnavailableError once a rank is lost. May be called from any thread."""
        if self._loss is None:
            dead = self._dead()
            if dead is None:
                return
            self._loss = dead
        raise WorkerUnavailableError(f"{self._loss}; this worker cannot go on and is replaced")

    def tell(self, head: Mapping[str, Any], buffers: Sequence[Buffer] = ()) -> None:
        """Send one message to every rank. Raises WorkerUnavailableError if one is lost."""
        self.check()
        for channel in self._channels.values():
            try:
                channel.send(dict(head), buffers)
            except OSError as error:
                raise self.lost(error) from error

    def lost(self, error: BaseException) -> WorkerUnavailableError:
        """The error to raise after a step broke off. Ends every rank."""
        deadline = time.monotonic() + _CAUSE_WAIT_S
        while self._loss is None:
            self._loss = self._dead()
            if self._loss is None and time.monotonic() > deadline:
                self._loss = f"the ranks of this worker lost one another ({_line(error)})"
            time.sleep(_POLL_S)
        _log.error("%s: %s", self._loss, _line(error))
        self.close()
        return WorkerUnavailableError(f"{self._loss}; this worker cannot go on and is replaced")

    def await_ready(self) -> dict[int, str]:
        """Each rank's fingerprint once it has loaded its part.

        Raises ModelLoadError with the sentence of the first rank that could not, or that was not
        ready within `_LOAD_TIMEOUT_S`.
        """
        found: dict[int, str] = {}
        deadline = time.monotonic() + _LOAD_TIMEOUT_S
        while len(found) < len(self._channels):
            waiting = {rank: c for rank, c in self._channels.items() if rank not in found}
            ready, _, _ = select.select(list(waiting.values()), [], [], _POLL_S)
            for rank, channel in waiting.items():
                if channel in ready:
                    found[rank] = self._report(rank, channel)
            if not ready:
                self._require_running()
                if time.monotonic() > deadline:
                    late = ", ".join(str(rank) for rank in waiting)
                    raise ModelLoadError(
                        f"rank {late} did not load its part within {_LOAD_TIMEOUT_S:.0f} s; see "
                        "whether its disk or its process stands still"
                    )
        return found

    def _report(self, rank: int, channel: Channel) -> str:
        try:
            head, _ = channel.receive()
        except (OSError, EOFError) as error:
            ended = self._ended(rank) or _line(error)
            raise ModelLoadError(f"rank {rank} ended while it loaded the model: {ended}") from error
        if "failed" in head:
            raise ModelLoadError(f"rank {rank}: {head['failed']}")
        return str(head["ready"])

    def _require_running(self) -> None:
        dead = self._dead()
        if dead is not None:
            raise PenstockError(f"{dead} during its start")

    def _dead(self) -> str | None:
        ended = {rank: self._ended(rank) for rank in self._processes}
        dead = [(rank, how) for rank, how in ended.items() if how is not None]
        # One that was killed says nothing; the others ended because they lost it.
        dead.sort(key=lambda found: not found[1].startswith("status"))
        for rank, how in dead[:1]:
            return f"rank {rank} of {self._ranks.world} has ended ({how})"
        return None

    def _ended(self, rank: int) -> str | None:
        return self._processes[rank].ended()

    def close(self) -> None:
        """Ends every rank. May be called again."""
        if self._loss is None:
            self._loss = "the engine is closed"
        for channel in self._channels.values():
            channel.close()
        for process in self._processes.values():
            process.stop()
        self._channels.clear()


def _line(error: BaseException) -> str:
    """The first line of an error of another library."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
