"""Hand-over: fetches a prompt's blocks as they are committed, then the state at its end.

Decode never computes a prompt token: it waits in `get` for what prefill publishes.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Protocol

from kvstore.contracts import BlockStore, Buffer, Missing
from penstock.errors import BlockIntegrityError, PenstockError, StoreUnavailableError
from penstock.identity import Chain

WAIT_S = 60.0
"""Patience of one `get` for each object; it is asked again until the request's own deadline."""
WINDOW_BLOCKS = 16
"""Blocks of one request that may wait for the engine's thread."""
_DAMAGED_AFTER = 5
_RETRY_S = 0.2
_RENEWALS_PER_TTL = 3

_log = logging.getLogger(__name__)


class Loading(Protocol):
    """What attaching needs of a sequence."""

    def load_block(self, index: int, payload: Buffer) -> asyncio.Future[None]: ...

    async def load_state(self, position: int, payload: Buffer) -> None: ...


class Used:
    """`Loading` that tells when the first piece comes: somebody has begun to read the prompt."""

    def __init__(self, inner: Loading, on_first: Callable[[], None]) -> None:
        self._inner, self._on_first = inner, on_first

    def load_block(self, index: int, payload: Buffer) -> asyncio.Future[None]:
        self._on_first()
        return self._inner.load_block(index, payload)

    async def load_state(self, position: int, payload: Buffer) -> None:
        self._on_first()
        await self._inner.load_state(position, payload)


async def attach_prompt(
    store: BlockStore,
    chain: Chain,
    sequence: Loading,
    *,
    owner: str,
    lease_ttl_s: float,
    is_there: bool = False,
) -> None:
    """Until `sequence` stands at the prompt's end. Has no deadline of its own: the caller's.

    `is_there`: everything has been committed and leased, so nobody will bring what is missing.
    Raises StoreUnavailableError, and BlockIntegrityError for an object that the store holds but
    that does not verify.
    """
    position = len(chain.tokens)
    ids = (*chain.blocks, chain.state_id(position))
    attached, refusals = 0, 0
    async with keep_leased(store, ids, owner=owner, ttl_s=lease_ttl_s):
        while attached < len(ids):
            before = attached
            attached += await _attach_some(
                store, ids, attached, sequence, position, owner=owner, lease_ttl_s=lease_ttl_s
            )
            if attached > before:
                refusals = 0
            elif (await store.has(ids[attached : attached + 1]))[0]:
                # It is there and yet cannot be had: damaged, or committed in this very moment.
                refusals += 1
                if refusals >= _DAMAGED_AFTER:
                    raise BlockIntegrityError(
                        f"object {attached} of the prompt's {len(ids)} in the KV store does not "
                        "verify"
                    )
            elif is_there:
                raise StoreUnavailableError(
                    "the KV store has lost what this answer was to go on from"
                )
            if attached < len(ids):
                await asyncio.sleep(_RETRY_S)


async def _attach_some(
    store: BlockStore,
    ids: Sequence[bytes],
    first: int,
    sequence: Loading,
    position: int,
    *,
    owner: str,
    lease_ttl_s: float,
) -> int:
    """Attach from `ids[first]` on until one is missing; how many it were."""
    loading: deque[asyncio.Future[None]] = deque()
    count = 0
    objects = store.get(ids[first:], owner=owner, lease_ttl_s=lease_ttl_s, wait_s=WAIT_S)
    try:
        async for item in objects:
            if isinstance(item, Missing):
                break
            if first + count < len(ids) - 1:
                loading.append(sequence.load_block(first + count, item.payload))
                if len(loading) >= WINDOW_BLOCKS:
                    await loading.popleft()
            else:
                await sequence.load_state(position, item.payload)
            count += 1
        while loading:
            await loading.popleft()
    finally:
        for future in loading:
            future.cancel()
        if isinstance(objects, AsyncGenerator):
            await objects.aclose()
    return count


@asynccontextmanager
async def keep_leased(
    store: BlockStore, ids: Sequence[bytes], *, owner: str, ttl_s: float
) -> AsyncIterator[None]:
    """Renew what is there of `ids` three times a TTL; after the block no renewal is under way."""

    async def renew() -> None:
        while True:
            await asyncio.sleep(ttl_s / _RENEWALS_PER_TTL)
            try:
                await store.lease(ids, owner=owner, ttl_s=ttl_s)
            except PenstockError as error:
                # If the store is gone, `get` says so where it matters.
                _log.warning("leases of %s were not renewed: %s", owner, error.message)

    renewing = asyncio.create_task(renew())
    try:
        yield
    finally:
        renewing.cancel()
        await asyncio.gather(renewing, return_exceptions=True)
