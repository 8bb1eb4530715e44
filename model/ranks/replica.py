"""Opening an engine over several ranks: rank 0's side, and a follower's life."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from model.engine import Engine, Sequence
from model.grid import Grid
from model.ranks.engine import CALLS, RankedEngine
from model.ranks.followers import Followers, Order, RankStarter
from model.ranks.handshake import knock
from model.ranks.message import Channel, unpack
from penstock.errors import ModelLoadError, PenstockError, UnavailableError
from penstock.worker import ModelSpec, RankSpec

if TYPE_CHECKING:
    from model.ranks.communicator import Communicator

_log = logging.getLogger(__name__)
OpenPart = Callable[["Communicator | None"], Engine]
"""Opens one rank's engine; None for an engine that exchanges nothing (the fake)."""


def open_replica(
    open_part: OpenPart,
    spec: ModelSpec,
    ranks: RankSpec,
    *,
    host: str,
    start: RankStarter,
    exchanges: bool,
) -> RankedEngine:
    """Rank 0's engine, once every follower has loaded its part.

    `host`: this process's address, over which the followers reach it. Raises `PenstockError`; then
    no follower is left.
    """
    followers = Followers(spec, ranks, host=host, start=start)
    try:
        comm = _meet_all(followers, ranks, host) if exchanges else None
        try:
            engine = open_part(comm)
        except RuntimeError:
            # Ranks meet while they load; one that could not says why.
            followers.await_ready()
            raise
        own = engine.info.fingerprint.hex()
        for rank, fingerprint in followers.await_ready().items():
            if fingerprint != own:
                raise ModelLoadError(
                    f"rank {rank} computes other numbers than rank 0: its machine, its torch or "
                    "its model folder differs"
                )
    except BaseException:
        followers.close()
        raise
    return RankedEngine(engine, followers)


def _meet_all(followers: Followers, ranks: RankSpec, host: str) -> Communicator:
    from model.ranks.groups import connect, host_meeting

    meeting, port = host_meeting(host, timeout_s=ranks.timeout_s)
    followers.tell({"meet": port})
    grid = Grid(ranks.tensor, ranks.expert, ranks.context)
    try:
        return connect(grid, meeting, address=host)
    except RuntimeError as error:
        raise UnavailableError(
            f"the ranks of this worker do not reach each other: {error}"
        ) from None


def follow(order: Order, open_part: OpenPart, *, exchanges: bool) -> None:
    """A follower: returns when rank 0 hangs up, raises whatever ends it early."""
    if exchanges:
        # Who knocks is ready to meet: loading torch takes longer than ranks wait for one another.
        import model.ranks.groups  # noqa: F401
    channel = knock(order.host, order.port, token=order.token, rank=order.rank)
    try:
        comm = _meet(order, channel) if exchanges else None
        engine = open_part(comm)
    except PenstockError as error:
        channel.send({"failed": error.message})
        raise
    channel.send({"ready": engine.info.fingerprint.hex()})
    try:
        _obey(engine, channel)
    finally:
        # Ends calls in which other ranks wait for this one.
        engine.close()
        channel.close()


def _meet(order: Order, channel: Channel) -> Communicator:
    from model.ranks.groups import connect, join_meeting

    head, _ = channel.receive()
    timeout_s = order.ranks.timeout_s
    try:
        meeting = join_meeting(order.host, int(head["meet"]), timeout_s=timeout_s)
        return connect(order.grid, meeting, address=channel.own_address)
    except RuntimeError as error:
        raise UnavailableError(f"it does not reach the other ranks: {error}") from None


def _obey(engine: Engine, channel: Channel) -> None:
    """Make every call that rank 0 makes, in its order."""
    sequences: dict[int, Sequence] = {}
    while True:
        try:
            head, data = channel.receive()
        except EOFError:
            return
        name = head["call"]
        if name not in CALLS:
            raise PenstockError(f"rank 0 asked for {name!r}, which is no engine call")
        arguments = [unpack(value, data, sequences) for value in head["arguments"]]
        try:
            made = getattr(engine, name)(*arguments)
        except ValueError:
            # Only what rank 0 refuses as well; anything else would part this rank from it.
            if not head["together"]:
                raise
            continue
        if head["number"] is not None:
            sequences[head["number"]] = made
        if name == "release":
            del sequences[head["arguments"][0]["sequence"]]
