"""Keeps a request's objects leased for as long as its work goes on."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

from kvstore.contracts import BlockStore
from penstock.errors import PenstockError

_RENEWALS_PER_TTL = 3
_log = logging.getLogger(__name__)


@asynccontextmanager
async def keep_leased(
    store: BlockStore, ids: Callable[[], Sequence[bytes]], *, owner: str, ttl_s: float
) -> AsyncIterator[None]:
    """While the block runs, the leases of `ids()` are renewed three times a TTL.

    After the block no renewal is under way. A renewal that fails is tried again: whether an object
    was lost meanwhile is checked where it matters.
    """

    async def renew() -> None:
        while True:
            await asyncio.sleep(ttl_s / _RENEWALS_PER_TTL)
            try:
                if held := ids():
                    await store.lease(held, owner=owner, ttl_s=ttl_s)
            except PenstockError as error:
                _log.warning("leases of %s were not renewed: %s", owner, error.message)

    renewing = asyncio.create_task(renew())
    try:
        yield
    finally:
        renewing.cancel()
        await asyncio.gather(renewing, return_exceptions=True)
