"""One question about one document: encode, run, collect. A batch's side of `cluster.flow`."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, cast

from cluster.auth.limiter import Admission
from cluster.auth.metered import charged_to
from cluster.batch.spec import DocumentSpec
from cluster.batch.surroundings import Surroundings
from penstock.chat.answer import AnswerReader, Content, Reasoning
from penstock.chat.encoder import ChatOptions, Encoded
from penstock.errors import (
    ContextLengthError,
    DeadlineError,
    PenstockError,
    RateLimitError,
    UnavailableError,
)
from penstock.identity import namespace, tenant_tag
from penstock.request import Finish, Priority, Progress, Request, TokenChunk, Usage

_ADMISSION_TRIES = 20
_ADMISSION_PAUSE_S = 0.25
Progressing = Callable[[int], Awaitable[None]]


@dataclass(frozen=True)
class Asked:
    """An answer in the parts that it has."""

    text: str
    reasoning: str
    finish_reason: str
    usage: Usage


@dataclass
class Questions:
    """Asks about one document. Belongs to one event loop."""

    around: Surroundings
    spec: DocumentSpec
    tenant: str
    document: str
    document_end: int = 0
    """Tokens that the document's prompts have in common; 0: not known."""
    _scope: bytes = field(init=False)

    def __post_init__(self) -> None:
        key = self.around.front.cluster_key_bytes
        self._scope = namespace(key, self.tenant, self.spec.cache_salt)

    @property
    def namespace(self) -> bytes:
        return self._scope

    async def encode(self, question: str) -> Encoded:
        """Long documents are remembered by the encoder, so each further question is quick."""
        options = ChatOptions(effort=self.spec.reasoning_effort or None)
        messages = self.spec.messages(self.document, question)
        chat = self.around.chat()
        size = len(self.document) + len(question)
        return await self.around.encode(
            lambda: chat.encode(messages, options, scope=self._scope), size
        )

    async def find_end(self, first: Encoded, other: str | None) -> None:
        """Where the document ends, so that a state is kept there: told by two of its prompts."""
        if other is not None:
            second = await self.encode(other)
            self.document_end = await asyncio.to_thread(
                _common_prefix, first.token_ids, second.token_ids
            )

    async def ask(self, encoded: Encoded, request_id: str, progressing: Progressing) -> Asked:
        """Raises whatever ends the request; nothing is held afterwards."""
        around = self.around
        model = await around.service.model()
        room = model.max_model_len - len(encoded.token_ids)
        if room < 1:
            raise ContextLengthError(
                f"document and question have {len(encoded.token_ids)} tokens and the model's "
                f"context is {model.max_model_len}; shorten the document"
            )
        wanted = self.spec.max_tokens or around.front.default_max_tokens
        request = Request(
            request_id=request_id,
            token_ids=tuple(encoded.token_ids),
            namespace=self._scope,
            sampling=self.spec.sampling(),
            stop=self.spec.stop_rule(min(wanted, room)),
            boundaries=_with(encoded.boundaries, self.document_end),
            tenant=tenant_tag(around.front.cluster_key_bytes, self.tenant),
            priority=Priority.BATCH,
        )
        admission = await self._admitted()
        try:
            with charged_to(admission):
                async with asyncio.timeout(around.front.request_timeout_s):
                    return await self._collect(request, encoded, progressing)
        except TimeoutError as error:
            raise DeadlineError(
                f"the answer was not whole within {around.front.request_timeout_s:.0f} s"
            ) from error
        finally:
            admission.leave()

    async def _admitted(self) -> Admission:
        """A place among the key's requests. Raises RateLimitError if none gets free soon."""
        for _ in range(_ADMISSION_TRIES):
            try:
                return self.around.admit(self.tenant, self.spec.caller)
            except RateLimitError as error:
                # Its own other questions are about to end; used-up tokens come back only later.
                if error.code != "concurrent_requests_exceeded":
                    raise
            await asyncio.sleep(_ADMISSION_PAUSE_S)
        return self.around.admit(self.tenant, self.spec.caller)

    async def _collect(self, request: Request, encoded: Encoded, progressing: Progressing) -> Asked:
        texts: list[str] = []
        async with aclosing(cast(Any, self.around.service.generate(request))) as events:
            async for event in events:
                if isinstance(event, Progress):
                    await progressing(event.tokens_done)
                elif isinstance(event, TokenChunk):
                    texts.append(event.text)
                elif isinstance(event, Finish):
                    text = "".join(texts) + event.text
                    content, reasoning = _parts(text, encoded)
                    return Asked(content, reasoning, event.reason, event.usage)
        raise UnavailableError("the answer ended before it was whole")


def _parts(text: str, encoded: Encoded) -> tuple[str, str]:
    """Content and reasoning. A batch gives the model no tools, so there are no calls."""
    if encoded.answer.plain:
        return text, ""
    reader = AnswerReader(encoded.answer)
    parts = [*reader.feed(text), *reader.close()]
    content = "".join(part.text for part in parts if isinstance(part, Content))
    return content, "".join(part.text for part in parts if isinstance(part, Reasoning))


def _common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    low, high = 0, min(len(one), len(other))
    # Slices compare at C's speed: a million tokens in a few milliseconds.
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _with(boundaries: tuple[int, ...], position: int) -> tuple[int, ...]:
    return tuple(sorted({*boundaries, position})) if position else boundaries


def failure(error: PenstockError) -> dict[str, Any]:
    """An error as a result."""
    return {"error": {"code": error.code or "internal_error", "message": error.message}}
