"""Works a claimed document off: its KV once, then its questions side by side, one result each."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from cluster.batch.ask import Asked, Questions, failure
from cluster.batch.pins import Pin, Pins
from cluster.batch.sources import Sources
from cluster.batch.spec import DocumentSpec
from cluster.batch.surroundings import Surroundings
from kvstore.journal.contracts import Claim, Item, ItemStatus, Journal, Tokens
from penstock.chat.encoder import Encoded
from penstock.errors import (
    AuthenticationError,
    InvalidRequestError,
    ModelNotFoundError,
    NotFoundError,
    PermissionDeniedError,
)
from penstock.identity import Chain

PERMANENT = (
    InvalidRequestError,
    AuthenticationError,
    PermissionDeniedError,
    ModelNotFoundError,
    NotFoundError,
)
"""Asking again changes nothing: these become the item's result."""
Commit = Callable[[Item, ItemStatus, dict[str, Any], Tokens], Awaitable[None]]


@dataclass
class Held:
    """A claim while it is worked on."""

    claim: Claim
    commit: Commit
    working: asyncio.Future[None] | None = None
    tokens: int = 0
    """How far the document has been read; the next renewal of the lease tells the journal."""


@dataclass
class DocumentWork:
    """Runs document jobs. `places` bounds the questions in work over all documents."""

    around: Surroundings
    journal: Journal
    sources: Sources
    pins: Pins
    places: asyncio.Semaphore

    async def run(self, held: Held) -> None:
        """Every item has a result afterwards. Raises what may be tried again."""
        claim = held.claim
        try:
            text = await self._text(claim)
        except PERMANENT as error:
            for item in claim.items:
                await held.commit(item, "failed", failure(error), Tokens())
            return
        spec = DocumentSpec.read(claim.job.spec)
        questions = Questions(self.around, spec, claim.job.tenant, text)
        async with self.pins.pinned(f"batch/{claim.job.id}/{claim.group}") as pin:
            await self._first(held, questions, pin)
            await side_by_side([self._one(held, questions, item) for item in claim.items[1:]])
            # Only now: after a failure whoever comes next finds what is pinned.
            await pin.drop()

    async def _text(self, claim: Claim) -> str:
        uri = claim.payload.get("uri", "")
        raw = (
            await self.sources.read(uri)
            if uri
            else await self.journal.read_blob(claim.blob, claim.chunks)
        )
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise InvalidRequestError(
                f"the document is not UTF-8 text (byte {error.start}); convert it first",
                code="not_text",
            ) from error

    async def _first(self, held: Held, questions: Questions, pin: Pin) -> None:
        """The question that has the document read. What is committed is pinned as it comes."""
        claim = held.claim
        first, *others = claim.items
        encoded: Encoded | None = None
        try:
            encoded = await questions.encode(first.payload["text"])
            other = others[0].payload["text"] if others else None
            await questions.find_end(encoded, other)
        except PERMANENT as error:
            await held.commit(first, "failed", failure(error), Tokens())
            return
        model = await self.around.service.model()
        root = Chain.start(bytes.fromhex(model.fingerprint), questions.namespace)
        chain = await asyncio.to_thread(root.extend, encoded.token_ids)

        async def progressing(tokens_done: int) -> None:
            held.tokens = max(held.tokens, tokens_done)
            await pin.reach(chain, tokens_done, questions.document_end)

        async with self.places:
            await self._ask(held, questions, first, encoded, progressing)

    async def _one(self, held: Held, questions: Questions, item: Item) -> None:
        async def progressing(tokens_done: int) -> None:
            held.tokens = max(held.tokens, tokens_done)

        async with self.places:
            try:
                encoded = await questions.encode(item.payload["text"])
            except PERMANENT as error:
                await held.commit(item, "failed", failure(error), Tokens())
                return
            await self._ask(held, questions, item, encoded, progressing)

    async def _ask(
        self,
        held: Held,
        questions: Questions,
        item: Item,
        encoded: Encoded,
        progressing: Callable[[int], Awaitable[None]],
    ) -> None:
        claim = held.claim
        # The attempt is part of the name: an overtaken one must not release the next one's leases.
        request_id = f"{claim.job.id}-{item.number}-{claim.token}"
        try:
            asked = await questions.ask(encoded, request_id, progressing)
        except PERMANENT as error:
            await held.commit(item, "failed", failure(error), Tokens())
            return
        usage = asked.usage
        tokens = Tokens(usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens)
        await held.commit(item, "succeeded", answer(asked), tokens)


def answer(asked: Asked) -> dict[str, Any]:
    """An answer as a result."""
    found = {"text": asked.text, "finish_reason": asked.finish_reason}
    return found | ({"reasoning": asked.reasoning} if asked.reasoning else {})


async def side_by_side(work: list[Any]) -> None:
    """Runs all; the first error ends the others and is raised."""
    tasks = [asyncio.ensure_future(each) for each in work]
    try:
        if tasks:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            for task in done:
                task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
