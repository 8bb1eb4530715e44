"""A decode worker's stream that ends without the answer's end, as a broken worker's may."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import MagicMock

from cluster.failover.relay import Relay
from cluster.policy import DECODE
from cluster.workers import DecodeFinished
from penstock.errors import PenstockError, WorkerUnavailableError
from penstock.request import Request, Resume, Sampling, StopRule, TokenChunk

TOKENS = (5, 6, 7, 8)


class _Calls:
    """The first stream ends cleanly after two tokens, the second one is whole."""

    def __init__(self) -> None:
        self.resumed: list[tuple[int, ...]] = []

    async def decode(
        self, worker: Any, request: Request, resume: Resume, granted: Callable[[bool], None], _: Any
    ) -> AsyncIterator[TokenChunk | DecodeFinished]:
        self.resumed.append(resume.emitted)
        granted(False)
        start = len(resume.emitted)
        for index in range(start, len(TOKENS)):
            if index == start + 2 and start == 0:
                return
            yield TokenChunk(index=index, token_ids=(TOKENS[index],), text="x")
        yield DecodeFinished("length", len(TOKENS), "")


async def test_a_stream_that_ends_early_goes_on_at_another_worker() -> None:
    moves: list[tuple[str, PenstockError]] = []

    async def move(role: str, error: PenstockError) -> None:
        moves.append((role, error))

    route = SimpleNamespace(decode=SimpleNamespace(worker_id="decode-0"))
    footing = MagicMock(route=route, attempt=0, move=move)
    request = Request(
        request_id="r",
        token_ids=(1, 2),
        namespace=bytes(32),
        sampling=Sampling(),
        stop=StopRule(max_tokens=4),
    )
    calls = _Calls()
    relay = Relay(MagicMock(), footing, cast(Any, calls), request)
    events = [event async for event in relay.events()]
    assert [e.token_ids[0] for e in events if isinstance(e, TokenChunk)] == list(TOKENS)
    assert isinstance(events[-1], DecodeFinished)
    assert calls.resumed == [(), TOKENS[:2]]
    ((role, error),) = moves
    assert role == DECODE and isinstance(error, WorkerUnavailableError)
