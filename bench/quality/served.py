"""Asks sheets through HTTP, as any client would: streamed chat completions with evidence."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import httpx
import orjson

from bench.quality.marks import Mark, citation
from bench.quality.sheets import Question, Sheet
from penstock.errors import PenstockError, UnavailableError

_SILENCE_S = 120.0
"""Longest wait for any byte; a server that reads a prompt sends keep-alives."""
_ANSWER_S = 3600.0
_BUSY_TRIES = 60
_MOST_WAIT_S = 30.0
_MOST_TOKENS = 8


@dataclass
class Reply:
    """One answer. `spans` are the evidence of the whole answer, heaviest first."""

    text: str = ""
    spans: list[dict[str, Any]] = field(default_factory=list)
    prompt_tokens: int = 0


class Asker:
    """A client of one server. `async with`; belongs to one event loop."""

    def __init__(self, url: str, *, model: str, key: str | None = None, streams: int = 2) -> None:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.AsyncClient(
            base_url=url.rstrip("/").removesuffix("/v1"), headers=headers, trust_env=False,
            timeout=httpx.Timeout(_SILENCE_S, connect=10.0),
        )  # fmt: skip
        self._model = model
        self._streams = asyncio.Semaphore(streams)

    async def __aenter__(self) -> Asker:
        try:
            answer = await self._http.get("/v1/models")
            known = [str(each["id"]) for each in answer.raise_for_status().json()["data"]]
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError, TypeError) as error:
            await self._http.aclose()
            raise UnavailableError(
                f"no OpenAI-compatible server answers at {self._http.base_url}: {error}; check "
                "--url"
            ) from error
        if self._model not in known:
            self._model = known[0]
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._http.aclose()

    async def marks(
        self, sheet: Sheet, *, gate: bool, done: Callable[[Mark], None] = lambda mark: None
    ) -> list[Mark]:
        """One mark for each question. The first question reads the document; the others find it
        in the store.
        """

        async def one(question: Question) -> Mark:
            async with self._streams:
                mark = await self._mark(sheet, question, gate=gate)
            done(mark)
            return mark

        first, *rest = sheet.questions
        marks = [await one(first)]
        tasks = [asyncio.ensure_future(one(question)) for question in rest]
        try:
            return marks + list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()

    async def _mark(self, sheet: Sheet, question: Question, *, gate: bool) -> Mark:
        prompt = f"{sheet.text}\n\n{question.text}"
        reply = await self.ask(prompt)
        gated = (await self.ask(prompt, grounding="strict")).text if gate else None
        cited, cited_code, named = citation(question, reply.spans)
        return Mark(
            sheet.tokens, sheet.facts, question.kind, question.depth, question.expected,
            reply.text, gated, cited, cited_code, named, reply.text in question.earlier,
            reply.prompt_tokens,
        )  # fmt: skip

    async def ask(self, prompt: str, **extra: Any) -> Reply:
        """One greedy answer. A busy server (429, 503) is asked again when it says so.

        Raises `PenstockError` if it refuses, breaks off, or stays busy.
        """
        body = orjson.dumps({
            "model": self._model, "messages": [{"role": "user", "content": prompt}],
            "temperature": 0, "max_tokens": _MOST_TOKENS, "stream": True, "evidence": True,
            "stream_options": {"include_usage": True}, **extra,
        })  # fmt: skip
        for _ in range(_BUSY_TRIES):
            try:
                async with asyncio.timeout(_ANSWER_S):
                    reply = await self._once(body)
            except TimeoutError as error:
                raise UnavailableError(f"no answer within {_ANSWER_S:.0f} s") from error
            except httpx.TransportError as error:
                raise UnavailableError(
                    f"the connection to {self._http.base_url} broke: {error!r}"
                ) from error
            if isinstance(reply, Reply):
                return reply
            await asyncio.sleep(reply)
        raise UnavailableError(f"the server stayed busy over {_BUSY_TRIES} attempts")

    async def _once(self, body: bytes) -> Reply | float:
        """The reply, or the seconds after which to ask again."""
        headers = {"Content-Type": "application/json"}
        reply = Reply()
        async with self._http.stream(
            "POST", "/v1/chat/completions", content=body, headers=headers
        ) as response:
            if response.status_code in (429, 503):
                await response.aread()
                after = response.headers.get("retry-after", "1")
                return min(float(after) if after.isdigit() else 1.0, _MOST_WAIT_S)
            if response.status_code != 200:
                text = (await response.aread()).decode(errors="replace")[:300]
                raise PenstockError(f"the server refused ({response.status_code}): {text}")
            async for line in response.aiter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    _read(orjson.loads(line[6:]), reply)
        reply.text = reply.text.strip()
        return reply


def _read(event: dict[str, Any], reply: Reply) -> None:
    if "error" in event:
        raise PenstockError(f"the server failed: {event['error'].get('message')}")
    for choice in event.get("choices", ()):
        delta = choice.get("delta", {})
        reply.text += delta.get("content") or ""
        reply.spans = delta.get("answer_evidence", reply.spans)
    usage = event.get("usage")
    if usage:
        reply.prompt_tokens = int(usage.get("prompt_tokens", 0))


async def ask_all(
    url: str, sheets: Iterable[Sheet], *, model: str, key: str | None, gate: bool,
    on_sheet: Callable[[Sheet], None], on_mark: Callable[[Mark], None],
) -> list[Mark]:  # fmt: skip
    """Sheets one after another, so that one document at a time is read."""
    marks: list[Mark] = []
    async with Asker(url, model=model, key=key) as asker:
        for sheet in sheets:
            on_sheet(sheet)
            marks += await asker.marks(sheet, gate=gate, done=on_mark)
    return marks
