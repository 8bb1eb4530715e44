"""An app over `FakeService`, reached through real HTTP semantics."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI

from cluster.api import create_app
from cluster.api.fake_service import FakeService
from cluster.config import FrontSection
from penstock.chat import PlainChat
from penstock.telemetry import Telemetry
from penstock.tokenizer import ByteTokenizer

CONTEXT = 4096


@dataclass
class Api:
    app: FastAPI
    service: FakeService

    def client(self, **headers: str) -> httpx.AsyncClient:
        transport = httpx.ASGITransport(self.app)
        return httpx.AsyncClient(transport=transport, base_url="http://api", headers=headers)


def make_api(*, context: int = CONTEXT, **front: Any) -> Api:
    service = FakeService(max_model_len=context)
    tokenizer = ByteTokenizer()
    app = create_app(
        service,
        tokenizer=tokenizer,
        chat=PlainChat(tokenizer),
        config=FrontSection(**{"max_body_bytes": 65536, "keep_alive_s": 0.1, **front}),
        telemetry=Telemetry(),
    )
    return Api(app, service)


@asynccontextmanager
async def served(app: FastAPI) -> AsyncIterator[str]:
    """`app` under a real uvicorn on a free port of this loop."""
    server = uvicorn.Server(
        uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning", access_log=False)
    )
    with no_signals(server):
        task = asyncio.create_task(server.serve())
        while not server.started:  # noqa: ASYNC110  uvicorn has no event for it
            await asyncio.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            server.should_exit = True
            await task


@contextmanager
def no_signals(server: uvicorn.Server) -> Iterator[None]:
    """pytest keeps its signal handlers."""
    original = server.capture_signals

    @contextmanager
    def nothing() -> Iterator[None]:
        yield

    server.capture_signals = nothing  # type: ignore[method-assign]
    yield
    server.capture_signals = original  # type: ignore[method-assign]


def chat(text: str = "hello", **more: Any) -> dict[str, Any]:
    return {"model": "fake", "messages": [{"role": "user", "content": text}], **more}
