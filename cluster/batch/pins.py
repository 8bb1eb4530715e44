"""Keeps a document's KV in the store while its questions run, and for a while after a crash.

A pin is a lease like a request's own, under an owner that outlives requests and fronts: whoever
takes the document over finds its blocks and the state of the last committed chunk.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc

from penstock.blocks import BLOCK_TOKENS, STATE_ALIGN_TOKENS
from penstock.identity import Chain
from protos.penstock.kv.v1 import kv_pb2, kv_pb2_grpc

_log = logging.getLogger(__name__)
_RPC_TIMEOUT_S = 5.0
_IDS_PER_CALL = 32_768
_RENEWALS_PER_TTL = 3


class Pins:
    """Over the store node's channel, which stays its caller's. A pin that fails only costs time:
    what was evicted is computed again.
    """

    def __init__(self, channel: grpc.aio.Channel, *, ttl_s: float) -> None:
        self._stub = kv_pb2_grpc.KvStoreStub(channel)
        self._ttl_s = ttl_s

    @asynccontextmanager
    async def pinned(self, owner: str) -> AsyncIterator[Pin]:
        """Renewed while the block runs, then kept for its TTL unless `Pin.drop` ends it."""
        pin = Pin(self._stub, owner, self._ttl_s)
        renewing = asyncio.create_task(self._renew(pin))
        try:
            yield pin
        finally:
            renewing.cancel()
            await asyncio.gather(renewing, return_exceptions=True)

    async def _renew(self, pin: Pin) -> None:
        while True:
            await asyncio.sleep(self._ttl_s / _RENEWALS_PER_TTL)
            await pin.renew()


class Pin:
    """The leases of one document."""

    def __init__(self, stub: Any, owner: str, ttl_s: float) -> None:
        self._stub = stub
        self._owner = owner
        self._ttl_s = ttl_s
        self._ids: dict[bytes, None] = {}
        self._blocks = 0
        self._last = b""

    async def reach(self, chain: Chain, position: int, keep: int = 0) -> None:
        """`position` tokens are committed: hold their blocks and the states to go on from, there
        and at or before `keep` (the document's end).
        """
        blocks = chain.blocks[self._blocks : position // BLOCK_TOKENS]
        self._blocks += len(blocks)
        fresh = dict.fromkeys(blocks)
        aligned = keep // STATE_ALIGN_TOKENS * STATE_ALIGN_TOKENS
        if 0 < aligned <= position:
            fresh[chain.state_id(aligned)] = None
        rolling = chain.state_id(position) if position else b""
        if rolling:
            fresh[rolling] = None
        # The chunk before has served: its rolling state need not be renewed any more.
        self._ids.pop(self._last, None)
        self._last = rolling
        self._ids |= fresh
        await self._lease(list(fresh))

    async def renew(self) -> None:
        await self._lease(list(self._ids))

    async def drop(self) -> None:
        self._ids.clear()
        with contextlib.suppress(grpc.aio.AioRpcError):
            await self._stub.Release(
                kv_pb2.ReleaseRequest(owner=self._owner), timeout=_RPC_TIMEOUT_S
            )

    async def _lease(self, ids: list[bytes]) -> None:
        try:
            for start in range(0, len(ids), _IDS_PER_CALL):
                await self._stub.Lease(
                    kv_pb2.LeaseRequest(
                        owner=self._owner,
                        ids=ids[start : start + _IDS_PER_CALL],
                        ttl_ms=int(self._ttl_s * 1e3),
                    ),
                    timeout=_RPC_TIMEOUT_S,
                )
        except grpc.aio.AioRpcError as error:
            _log.warning("a document is not pinned in the store: %s", error.code().name)
