"""`StoreMirror`: the mirror of real nodes, by one subscription each."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence

import grpc
import numpy as np
from google.protobuf.message import DecodeError

from kvstore.channel import open_channel
from kvstore.mirror import NAME_BYTES, PromptIds, Resumable, resumable_tokens
from kvstore.mirror_table import Names, NodeView, names_of
from kvstore.rpc import error_from
from penstock.blocks import BLOCK_TOKENS
from penstock.errors import PenstockError, StoreUnavailableError
from penstock.peers import ALONE, Peers
from protos.penstock.kv.v1 import kv_pb2

_log = logging.getLogger(__name__)
_SUBSCRIBE = "/penstock.kv.v1.KvStore/Subscribe"
_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 2.0


class StoreMirror:
    """`Mirror` of the nodes at `addresses`. Belongs to one event loop; `start` once, then `close`.

    A subscription that fails, or says nothing for `silence_s` (nodes speak every second), is made
    again; until its snapshot is whole the old picture answers, and `age_s` grows.
    """

    def __init__(
        self, addresses: Sequence[str], *, peers: Peers = ALONE, silence_s: float = 5.0
    ) -> None:
        self._silence_s = silence_s
        self._views = {address: NodeView() for address in addresses}
        self._channels = {address: open_channel(address, peers) for address in addresses}
        self._tasks: list[asyncio.Task[None]] = []
        self.resyncs = 0
        """Subscriptions made after the first of each node."""

    def start(self) -> None:
        self._tasks = [asyncio.create_task(self._follow(address)) for address in self._views]

    async def close(self) -> None:
        """May be called again."""
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for channel in self._channels.values():
            await channel.close()

    @property
    def age_s(self) -> float:
        now = time.monotonic()
        return max((now - view.heard_at for view in self._views.values()), default=float("inf"))

    @property
    def views(self) -> tuple[NodeView, ...]:
        """One a node, in the order of the addresses."""
        return tuple(self._views.values())

    def resumable(self, prompt: PromptIds) -> Resumable:
        names = _names(prompt.blocks)
        by_node = {view.node_id: view.names.has(names) for view in self._views.values()}
        present = np.zeros(len(names), np.bool_)
        for held in by_node.values():
            present |= held
        blocks = len(names) if present.all() else int(np.argmin(present))
        counts = {node: int(held[:blocks].sum()) for node, held in by_node.items()}
        return Resumable(
            resumable_tokens(prompt, blocks, self._has),
            blocks * BLOCK_TOKENS,
            self.age_s,
            {node: count for node, count in counts.items() if count},
        )

    def nodes_of(self, ids: Sequence[bytes]) -> list[tuple[str, ...]]:
        names = _names(ids)
        found = [(view.node_id, view.names.has(names)) for view in self._views.values()]
        return [tuple(node for node, held in found if held[at]) for at in range(len(ids))]

    def _has(self, ids: Sequence[bytes]) -> list[bool]:
        names = _names(ids)
        present = np.zeros(len(names), np.bool_)
        for view in self._views.values():
            present |= view.names.has(names)
        return [bool(there) for there in present]

    async def _follow(self, address: str) -> None:
        view, pause_s, is_first = self._views[address], _FIRST_PAUSE_S, True
        while True:
            self.resyncs += not is_first
            is_first = False
            heard_at = view.heard_at
            try:
                await self._subscribe(address, view)
            except PenstockError as error:
                _log.info("the mirror of %s begins again: %s", address, error.message)
            # A node that did speak has another chance soon, one that is away costs less and less.
            if view.heard_at > heard_at:
                pause_s = _FIRST_PAUSE_S
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    async def _subscribe(self, address: str, view: NodeView) -> None:
        """Follow one subscription to its end."""
        call = self._channels[address].unary_stream(_SUBSCRIBE)(
            kv_pb2.SubscribeRequest().SerializeToString()
        )
        view.begin()
        try:
            while True:
                async with asyncio.timeout(self._silence_s):
                    raw = await call.read()
                if raw is grpc.aio.EOF:
                    return
                view.take(kv_pb2.IndexEvents.FromString(raw), time.monotonic())
        except grpc.aio.AioRpcError as error:
            raise error_from(error, address) from error
        except TimeoutError as error:
            raise StoreUnavailableError(f"no word for {self._silence_s} s") from error
        except DecodeError as error:
            raise StoreUnavailableError("its bytes are no message") from error
        finally:
            call.cancel()


def _names(ids: Sequence[bytes]) -> Names:
    return names_of(b"".join(id_[:NAME_BYTES] for id_ in ids))
