"""Puts the HTTP API together."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import AsyncIterator, Callable, Mapping

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from cluster.api import batches, errors, files, generate, meta, overview, page, routes
from cluster.api.describe import describe
from cluster.api.inside import InsideCalls
from cluster.api.scope import RequestScope
from cluster.api.state import ApiState
from cluster.batch.lines import Inside
from cluster.batch.room import BatchRoom
from cluster.batch.surroundings import Surroundings
from cluster.config import FrontSection
from cluster.contracts import Service
from kvstore.journal.streams import StreamJournal
from penstock.chat import ChatEncoder
from penstock.errors import PenstockError
from penstock.telemetry import Telemetry
from penstock.tokenizer import Tokenizer

OpenBatch = Callable[[Surroundings, Inside], BatchRoom]


def create_app(
    service: Service,
    *,
    tokenizer: Tokenizer | None,
    chat: ChatEncoder | None,
    config: FrontSection,
    telemetry: Telemetry,
    sampling_defaults: Mapping[str, float] | None = None,
    batch: OpenBatch | None = None,
    streams: StreamJournal | None = None,
) -> FastAPI:
    """The app over `service`, which stays its caller's to close.

    `sampling_defaults` is what the model's generation_config.json wants
    (`penstock.folder.sampling_defaults`). Without a tokenizer only health and metrics work.
    `batch` opens the room of batch jobs, which lives as long as the app serves; None: no jobs.
    `streams`: where streams are kept for clients that reconnect; closed with the app.
    """
    state = ApiState(
        service=service,
        tokenizer=tokenizer,
        chat=chat,
        config=config,
        telemetry=telemetry,
        sampling_defaults=sampling_defaults or {},
        streams=streams,
    )

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        room = app.state.batch
        try:
            if room is not None:
                await room.start()
            yield
        finally:
            if room is not None:
                await room.stop()
            if streams is not None:
                await streams.close()
            state.close()

    app = FastAPI(title="Penstock", lifespan=lifespan, redoc_url=None, redirect_slashes=False)
    app.state.penstock = state
    app.state.overview = overview.Overview()
    app.state.page = page.Page()
    app.state.batch = None if batch is None else batch(_surroundings(state), InsideCalls(app))
    app.include_router(generate.router)
    app.include_router(files.router)
    app.include_router(batches.router)
    app.include_router(meta.router)
    app.include_router(overview.router)
    app.include_router(routes.router)
    app.include_router(page.router)
    app.add_middleware(RequestScope, state=state)
    keyed = bool(config.keys) or config.api_keys_file is not None
    document = functools.cache(lambda: describe(app, keyed=keyed))
    app.openapi = document  # type: ignore[method-assign]  # FastAPI's own way to replace it
    app.add_exception_handler(PenstockError, _penstock_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(ClientDisconnect, _client_gone)
    return app


def _surroundings(state: ApiState) -> Surroundings:
    return Surroundings(
        service=state.service,
        chat=lambda: state.chat,
        encode=state.encode,
        limiter=state.limiter,
        authenticator=state.authenticator,
        front=state.config,
        telemetry=state.telemetry,
    )


def _penstock_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, PenstockError):
        raise error
    state: ApiState = request.app.state.penstock
    state.telemetry.failed(error)
    return errors.response(error)


def _http_error(request: Request, error: Exception) -> Response:
    """Unknown routes and methods, in the shape of every other error."""
    if not isinstance(error, HTTPException):
        raise error
    place = f"{request.method} {ascii(request.url.path[:200])[1:-1]}"
    if error.status_code == 404:
        known = errors.HttpError(404, f"there is nothing at {place}; see /docs", code="unknown_url")
    elif error.status_code == 405:
        known = errors.HttpError(
            405, f"{place} is not possible; see /docs for its method", code="method_not_allowed"
        )
    else:
        known = errors.HttpError(error.status_code, str(error.detail), code="http_error")
    response = errors.response(known)
    response.headers.update(error.headers or {})
    return response


def _client_gone(request: Request, error: Exception) -> Response:
    """Nobody reads it; the count of responses shows it as 499."""
    return Response(status_code=499)
