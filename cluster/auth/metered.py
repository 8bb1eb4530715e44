"""`MeteredService`: a `Service` that charges whoever the current request belongs to.

Quotas are enforced where answers are made, so that no endpoint can forget them: one HTTP request
with several choices is charged for each. The admission travels in a context variable, which tasks
started on behalf of a request inherit.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from contextvars import ContextVar
from typing import Any, cast

from cluster.auth.limiter import Admission
from cluster.contracts import Readiness, ServedModel, Service, WorkerView
from cluster.routing.told import Told
from penstock.request import Event, Finish, Progress, Request, TokenChunk

_current: ContextVar[Admission | None] = ContextVar("penstock_admission", default=None)


@contextlib.contextmanager
def charged_to(admission: Admission | None) -> Iterator[None]:
    """What runs inside is charged to `admission`; None: to nobody."""
    token = _current.set(admission)
    try:
        yield
    finally:
        _current.reset(token)


class MeteredService:
    """Everything but `generate` passes through. The inner service stays its caller's to close."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def generate(self, request: Request) -> AsyncIterator[Event]:
        """Raises RateLimitError or ContextLengthError before the first event."""
        admission = _current.get()
        if admission is None or admission.caller.limits.unlimited:
            return self._service.generate(request)
        return self._charged(request, admission)

    async def _charged(self, request: Request, admission: Admission) -> AsyncIterator[Event]:
        prompt_tokens = len(request.token_ids)
        admission.check(prompt_tokens)
        charged = 0
        read = False
        # Services are async generators, though their contract says only iterator.
        events = cast("Any", self._service.generate(request))
        async with aclosing(events):
            async for event in events:
                cost = 0
                if isinstance(event, Progress) and not read:
                    # Charged as soon as it is known: who hangs up later has still cost this.
                    read, cost = True, event.tokens_total - event.cached_tokens
                elif isinstance(event, TokenChunk):
                    cost = len(event.token_ids)
                elif isinstance(event, Finish):
                    usage = event.usage
                    miss = usage.prompt_tokens - usage.cached_tokens
                    cost = miss + usage.completion_tokens - charged
                if cost:
                    admission.charge(cost)
                    charged += cost
                yield event

    async def model(self) -> ServedModel:
        return await self._service.model()

    async def readiness(self) -> Readiness:
        return await self._service.readiness()

    async def workers(self) -> list[WorkerView]:
        return await self._service.workers()

    async def route_told(self, request_id: str, *, tenant: bytes) -> Told | None:
        return await self._service.route_told(request_id, tenant=tenant)

    async def store_stat(self) -> dict[str, float]:
        return await self._service.store_stat()

    async def expositions(self) -> list[bytes | None]:
        return await self._service.expositions()

    async def close(self) -> None:
        await self._service.close()
