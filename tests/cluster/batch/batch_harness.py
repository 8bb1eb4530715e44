"""The batch service in this process: a real gRPC server, journal and store node, a fake model."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from fastapi import FastAPI

from cluster.api import create_app
from cluster.api.fake_service import FakeService
from cluster.batch.config import BatchSection
from cluster.batch.lines import Inside
from cluster.batch.room import BatchRoom
from cluster.batch.surroundings import Surroundings
from cluster.config import FrontSection
from cluster.launchers.common import free_port
from kvstore.config import StoreConfig
from kvstore.server import start_server
from penstock.chat import PlainChat
from penstock.client import AsyncBatchClient, Document
from penstock.telemetry import Telemetry
from penstock.tokenizer import ByteTokenizer

ANSWER = ((65, "yes"),)


@dataclass
class Batch:
    service: FakeService
    app: FastAPI
    target: str
    config: BatchSection

    def client(self, **more: Any) -> AsyncBatchClient:
        return AsyncBatchClient(self.target, **{"retry_s": 20.0, **more})


@contextlib.asynccontextmanager
async def batch_front(
    folder: Path, *, port: int | None = None, front: dict[str, Any] | None = None, **batch: Any
) -> AsyncIterator[Batch]:
    """A front with its jobs in `folder`; opened again there it goes on."""
    service = FakeService(max_model_len=1 << 16)
    service.plan.answer = ANSWER
    tokenizer = ByteTokenizer()
    port = port or free_port()
    config = BatchSection(
        **{"journal_url": f"sqlite:///{folder}/journal.db", "grpc_port": port, **batch}
    )
    store = await start_server(StoreConfig())

    def open_batch(around: Surroundings, inside: Inside) -> BatchRoom:
        return BatchRoom(config, around, lambda: grpc.aio.insecure_channel(store.address), inside)

    app = create_app(
        service,
        tokenizer=tokenizer,
        chat=PlainChat(tokenizer),
        config=FrontSection(**(front or {})),
        telemetry=Telemetry(),
        batch=open_batch,
    )
    try:
        async with app.router.lifespan_context(app):
            yield Batch(service, app, f"127.0.0.1:{port}", config)
    finally:
        await store.stop(0.1)


def documents(count: int, questions: int = 2, text: str = "Some text. ") -> list[Document]:
    return [
        Document.from_text(
            f"{number}: " + text * 20, [f"what about {q}?" for q in range(questions)]
        )
        for number in range(count)
    ]
