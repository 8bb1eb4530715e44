"""Tells the index what the node holds, and tells it again when the index has forgotten.

One task owns all writes to the index, so that they keep their order. Nothing here can fail a
request: while the index is away changes are merged and, once there are too many, replaced by one
full announcement in rate-limited batches.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from itertools import islice

from kvstore.config import StoreConfig
from kvstore.contracts import Index, Location
from penstock.errors import IndexUnavailableError


class Announcer:
    """The node's writer to its index. `run` is its one task; the other methods never block."""

    def __init__(
        self,
        index: Index,
        config: StoreConfig,
        *,
        node_id: str,
        epoch: int,
        ids: Callable[[], list[bytes]],
        size_of: Callable[[bytes], int | None],
    ) -> None:
        """`ids` and `size_of` read the node's catalogue: the truth to announce."""
        self._index = index
        self._config = config
        self._node_id = node_id
        self._epoch = epoch
        self._ids = ids
        self._size_of = size_of
        self._pending: dict[bytes, bool] = {}
        self._backlog: deque[bytes] = deque()
        self._announce_all = True
        self._healthy = True
        self._wake = asyncio.Event()
        self._next_heartbeat = 0.0
        self._next_refresh = 0.0

    @property
    def backend(self) -> str:
        return self._index.backend

    @property
    def healthy(self) -> bool:
        """Did the latest call to the index succeed?"""
        return self._healthy

    def added(self, id_: bytes) -> None:
        self._change(id_, True)

    def removed(self, id_: bytes) -> None:
        self._change(id_, False)

    async def hello(self, address: str) -> None:
        """First heartbeat. Raises IndexUnavailableError if the index cannot be reached."""
        await self._index.heartbeat(self._node_id, address, self._epoch)

    async def run(self, address: str) -> None:
        """Until cancelled. `address`: where this node can be called."""
        while True:
            self._wake.clear()
            try:
                pause_s = await self._step(address)
                self._healthy = True
            except IndexUnavailableError:
                self._healthy = False
                self._announce_all = True
                pause_s = self._config.heartbeat_s
                await asyncio.sleep(pause_s)
                continue
            if self._backlog:
                await asyncio.sleep(pause_s)
                continue
            try:
                async with asyncio.timeout(pause_s):
                    await self._wake.wait()
            except TimeoutError:
                continue

    def _change(self, id_: bytes, present: bool) -> None:
        self._pending[id_] = present
        if len(self._pending) > self._config.max_pending_announcements:
            # Forgotten removals leave stale entries until their TTL: wasted calls, no wrong byte.
            self._pending.clear()
            self._announce_all = True
        self._wake.set()

    async def _step(self, address: str) -> float:
        """One batch of work; returns how long to pause, in seconds."""
        now = time.monotonic()
        if now >= self._next_heartbeat:
            known = await self._index.heartbeat(self._node_id, address, self._epoch)
            self._announce_all |= not known
            self._next_heartbeat = now + self._config.heartbeat_s
        if self._announce_all or now >= self._next_refresh:
            self._backlog = deque(self._ids())
            self._announce_all = False
            self._next_refresh = now + self._config.index_entry_ttl_s / 2
        await self._send_pending()
        if self._backlog:
            batch = [self._backlog.popleft() for _ in range(self._batch_size())]
            await self._add(batch)
            return len(batch) / self._config.announce_per_s
        return max(0.0, self._next_heartbeat - time.monotonic())

    def _batch_size(self) -> int:
        return min(self._config.announce_batch, len(self._backlog))

    async def _send_pending(self) -> None:
        while self._pending:
            batch = dict(islice(self._pending.items(), self._config.announce_batch))
            for id_ in batch:
                del self._pending[id_]
            try:
                await self._add([id_ for id_, present in batch.items() if present])
                gone = [id_ for id_, present in batch.items() if not present]
                if gone:
                    await self._index.remove(gone, node_id=self._node_id, epoch=self._epoch)
            except IndexUnavailableError:
                # Newer changes of the same ids win over those that were not sent.
                self._pending = batch | self._pending
                raise

    async def _add(self, ids: list[bytes]) -> None:
        """Announce those that the node still holds."""
        entries = []
        for id_ in ids:
            size_bytes = self._size_of(id_)
            if size_bytes is not None:
                entries.append((id_, Location(self._node_id, self._epoch, size_bytes)))
        if entries:
            await self._index.add(entries)
