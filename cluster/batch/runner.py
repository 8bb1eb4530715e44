"""Takes work out of the journal, keeps its lease while it runs, gives back what may run again."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Any

from cluster.batch.ask import failure
from cluster.batch.config import BatchSection
from cluster.batch.documents import PERMANENT, Held
from cluster.contracts import Service
from kvstore.journal.contracts import Claim, Item, ItemStatus, Journal, Tokens
from penstock.errors import LeaseLostError, OverloadedError, PenstockError, UnavailableError
from penstock.telemetry import Telemetry, request_scope
from penstock.telemetry import catalog as M

_log = logging.getLogger(__name__)
_IDLE_S = 1.0
_NOT_READY_S = 0.5
_FIRST_DELAY_S = 0.5
_LONGEST_DELAY_S = 10.0
_SWEEP_PERIOD_S = 30.0
_RENEWALS_PER_LEASE = 3
_COMMIT_TRIES = 20

Work = Callable[[Held], Awaitable[None]]


class Runner:
    """`max_documents` claims at once. Belongs to one event loop; `stop` gives everything back."""

    def __init__(
        self,
        journal: Journal,
        service: Service,
        work: Mapping[str, Work],
        config: BatchSection,
        telemetry: Telemetry,
    ) -> None:
        """`work`: what runs a claim, by the kind of its job."""
        self._journal = journal
        self._service = service
        self._work = work
        self._config = config
        self._telemetry = telemetry
        telemetry.meters.read(M.BATCH_RUNNING, lambda: len(self.running))
        self._owner = f"front-{secrets.token_hex(8)}"
        self._poked = asyncio.Event()
        # Of all free places one looks for work; the others wait for their turn.
        self._turn = asyncio.Lock()
        self._tasks: list[asyncio.Task[None]] = []
        self.running: dict[tuple[str, int], Held] = {}
        """Claims in work in this front."""

    def start(self) -> None:
        if not self._tasks:
            loops = [self._serve() for _ in range(self._config.max_documents)]
            self._tasks = [asyncio.create_task(loop) for loop in (*loops, self._sweep())]

    def poke(self) -> None:
        """There may be new work."""
        self._poked.set()

    def cancel(self, job_id: str) -> None:
        """The job has been cancelled: end its work in this front now. Other fronts hear of it when
        they next renew or commit.
        """
        for held in list(self.running.values()):
            if held.claim.job.id == job_id and held.working is not None:
                held.working.cancel()

    async def stop(self) -> None:
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self) -> None:
        while True:
            try:
                async with self._turn:
                    claim = await self._claim()
                    if claim is None:
                        await self._rest()
                if claim is not None:
                    with self._watched(claim):
                        await self._run(claim)
            except PenstockError as error:
                _log.warning("batch jobs pause: %s", error.message)
                await asyncio.sleep(_IDLE_S)
            except Exception:
                # The boundary: one bad claim must not end the service of all.
                _log.exception("a batch claim failed in an unexpected way")
                await asyncio.sleep(_IDLE_S)

    @contextlib.contextmanager
    def _watched(self, claim: Claim) -> Iterator[None]:
        """Log lines and a trace of this piece of a job, also in the workers."""
        place = f"{claim.job.id}/{claim.group}"
        tracer = self._telemetry.tracer
        with (
            request_scope(place),
            tracer.entry("batch claim", (), may_begin=True, penstock__request_id=place),
        ):
            yield

    async def _claim(self) -> Claim | None:
        # While nothing could be answered, claims would only use up a document's tries.
        readiness = await self._service.readiness()
        if not readiness.ready:
            await asyncio.sleep(_NOT_READY_S)
            return None
        model = await self._service.model()
        return await self._journal.claim(
            self._owner, models=[model.name], lease_s=self._config.lease_s
        )

    async def _rest(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_IDLE_S):
                await self._poked.wait()
        self._poked.clear()

    async def _run(self, claim: Claim) -> None:
        async def commit(
            item: Item, status: ItemStatus, result: dict[str, Any], tokens: Tokens
        ) -> None:
            await self._commit(claim, item, status, result, tokens)

        if claim.claims > self._config.max_claims:
            # Whatever it was took the front down each time before it could say so.
            told = PenstockError(f"given up: {claim.claims - 1} tries ended without a word")
            await self._give_up(claim, told)
            return
        held = Held(claim, commit)
        place = (claim.job.id, claim.group)
        self.running[place] = held
        working = held.working = asyncio.ensure_future(self._work_of(claim)(held))
        keeping = asyncio.create_task(self._keep(held, working))
        try:
            await asyncio.wait({working})
            working.result()
        except asyncio.CancelledError:
            if not working.cancelled() or _being_cancelled():
                await self._abandon(claim, working)
                raise
            # The lease was lost, or the job cancelled. If nobody has it, whoever resumes may.
            await self._abandon(claim, working)
        except LeaseLostError as error:
            _log.info("%s", error.message)
            await self._abandon(claim, working)
        except PenstockError as error:
            await self._failed(held, error)
        except Exception as error:
            _log.exception("a document of %s failed in an unexpected way", claim.job.id)
            await self._failed(held, PenstockError(f"the front failed on it: {error!r}"))
        finally:
            keeping.cancel()
            working.cancel()
            await asyncio.gather(keeping, working, return_exceptions=True)
            self.running.pop(place, None)

    def _work_of(self, claim: Claim) -> Work:
        work = self._work.get(claim.job.kind)
        if work is None:
            raise PenstockError(f"this front cannot run jobs of kind {claim.job.kind!a}")
        return work

    async def _abandon(self, claim: Claim, working: asyncio.Future[None]) -> None:
        """The next one may have the document at once."""
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)
        with contextlib.suppress(PenstockError):
            await self._journal.give_back(claim, delay_s=0.0, counted=False)

    async def _keep(self, held: Held, working: asyncio.Future[None]) -> None:
        """Renews the lease; ends the work when it is lost."""
        while True:
            await asyncio.sleep(self._config.lease_s / _RENEWALS_PER_LEASE)
            try:
                await self._journal.renew(
                    held.claim, lease_s=self._config.lease_s, tokens=held.tokens
                )
            except LeaseLostError as error:
                _log.info("%s", error.message)
                working.cancel()
                return
            except UnavailableError as error:
                # What is answered meanwhile is fenced, so going on does no harm.
                _log.warning("a lease was not renewed: %s", error.message)

    async def _commit(
        self, claim: Claim, item: Item, status: ItemStatus, result: dict[str, Any], tokens: Tokens
    ) -> None:
        """An answer is dear: a journal that is away for a moment must not cost it."""
        for attempt in range(_COMMIT_TRIES):
            try:
                await self._journal.commit(claim, item.number, status, result, tokens)
                self._count(status, tokens)
                return
            except UnavailableError:
                if attempt == _COMMIT_TRIES - 1:
                    raise
                await asyncio.sleep(min(0.1 * 2**attempt, 2.0))

    def _count(self, status: ItemStatus, tokens: Tokens) -> None:
        meters = self._telemetry.meters
        meters.add(M.BATCH_ITEMS, outcome=status)
        meters.add(M.BATCH_TOKENS, tokens.prompt - tokens.cached, kind="computed")
        meters.add(M.BATCH_TOKENS, tokens.cached, kind="cached")
        meters.add(M.BATCH_TOKENS, tokens.completion, kind="completion")

    async def _failed(self, held: Held, error: PenstockError) -> None:
        claim = held.claim
        if claim.claims >= self._config.max_claims or isinstance(error, PERMANENT):
            told = PenstockError(
                f"given up after {claim.claims} tries; the last one: {error.message}",
                code=error.code,
            )
            await self._give_up(claim, told)
            return
        self._telemetry.meters.add(M.BATCH_RETRIES)
        delay_s = min(_FIRST_DELAY_S * 2 ** min(claim.claims - 1, 10), _LONGEST_DELAY_S)
        if error.retry_after_s is not None:
            delay_s = max(delay_s, min(error.retry_after_s, 60.0))
        # No room is nobody's fault and no reason to give up.
        counted = not isinstance(error, OverloadedError)
        _log.warning(
            "document %d of %s is tried again in %.1f s: %s",
            claim.group,
            claim.job.id,
            delay_s,
            error.message,
        )
        await self._journal.give_back(claim, delay_s=delay_s, counted=counted)

    async def _give_up(self, claim: Claim, error: PenstockError) -> None:
        for item in claim.items:
            with contextlib.suppress(LeaseLostError):
                await self._commit(claim, item, "failed", failure(error), Tokens())

    async def _sweep(self) -> None:
        while True:
            try:
                while await self._journal.sweep():
                    continue
            except PenstockError as error:
                _log.warning("expired jobs stay for now: %s", error.message)
            await asyncio.sleep(_SWEEP_PERIOD_S)


def _being_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and bool(task.cancelling())
