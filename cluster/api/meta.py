"""Everything beside generation: models, tokenizing, health, version, metrics."""

from __future__ import annotations

import asyncio
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import orjson
from fastapi import APIRouter, Request, Response

from cluster.api.intake import parse, read_body, state_of
from cluster.api.schema import DetokenizeBody, TokenizeBody
from cluster.contracts import ServedModel, WorkerView
from cluster.policy import DECODE, PREFILL
from penstock.errors import InvalidRequestError, PenstockError
from penstock.telemetry import CONTENT_TYPE
from penstock.telemetry import catalog as M
from penstock.telemetry.meters import Meters

router = APIRouter()
_READY_TIMEOUT_S = 5.0


def _json(content: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(content), status, media_type="application/json")


def _model_object(model: ServedModel) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "penstock",
        "max_model_len": model.max_model_len,
        "system_fingerprint": model.fingerprint,
    }


@router.get("/v1/models")
async def models(request: Request) -> Response:
    """The one served model, as a list."""
    model = await state_of(request).model()
    return _json({"object": "list", "data": [_model_object(model)]})


@router.get("/v1/models/{model_id:path}")
async def model(request: Request, model_id: str) -> Response:
    return _json(_model_object(await state_of(request).model(model_id)))


@router.post("/tokenize")
async def tokenize(request: Request) -> Response:
    """Token ids of `prompt`, or of `messages` as a chat request would encode them."""
    state = state_of(request)
    raw = await read_body(request, state.config.max_body_bytes)
    chat, tokenizer = state.chat, state.tokenizer
    tenant: str = request.scope["penstock.tenant"]

    def work() -> list[int]:
        body = parse(TokenizeBody, raw)
        if (body.prompt is None) == (body.messages is None):
            raise InvalidRequestError("send either prompt or messages", param="prompt")
        if body.prompt is not None:
            return tokenizer.encode(body.prompt)
        options = body.chat_options()
        return chat.encode(body.messages or [], options, scope=tenant.encode()).token_ids

    tokens = await state.encode(work, len(raw))
    model = await state.model()
    return _json({"count": len(tokens), "max_model_len": model.max_model_len, "tokens": tokens})


@router.post("/detokenize")
async def detokenize(request: Request) -> Response:
    """Text of `tokens`, control tokens included."""
    state = state_of(request)
    raw = await read_body(request, state.config.max_body_bytes)
    tokenizer = state.tokenizer

    def work() -> str:
        return tokenizer.decode(parse(DetokenizeBody, raw).tokens, specials=True)

    return _json({"prompt": await state.encode(work, len(raw))})


@router.get("/health")
async def health() -> Response:
    """This process answers."""
    return _json({"status": "ok"})


@router.get("/ready")
async def ready(request: Request) -> Response:
    """200 if a request could be served now, else 503 with what is missing."""
    try:
        async with asyncio.timeout(_READY_TIMEOUT_S):
            readiness = await state_of(request).service.readiness()
        is_ready, reason = readiness.ready, readiness.reason
    except PenstockError as error:
        is_ready, reason = False, error.message
    except TimeoutError:
        is_ready, reason = False, f"the cluster did not answer within {_READY_TIMEOUT_S:.0f} s"
    return _json({"ready": is_ready, "reason": reason}, 200 if is_ready else 503)


def own_version() -> str:
    try:
        return version("penstock")
    except PackageNotFoundError:
        return "0+unknown"


@router.get("/version")
async def show_version() -> Response:
    return _json({"version": own_version()})


@router.get("/metrics")
async def metrics(request: Request, scope: str = "cluster") -> Response:
    """Prometheus text: this front, every live worker, the store node; of this front alone with
    `?scope=front`, for a Prometheus that scrapes each process by itself.
    """
    state = state_of(request)
    telemetry, meters = state.telemetry, state.telemetry.meters
    if scope not in ("cluster", "front"):
        raise InvalidRequestError("scope is 'cluster' or 'front'", param="scope")
    others: list[bytes] = []
    try:
        async with asyncio.timeout(_READY_TIMEOUT_S):
            _show_workers(meters, await state.service.workers())
            if scope == "cluster":
                told = await state.service.expositions()
                others = [text for text in told if text is not None]
                meters.add(M.SCRAPE_FAILURES, len(told) - len(others))
        meters.set(M.UNREACHABLE, 0)
    except (PenstockError, TimeoutError):
        # A scrape must show the front's own counters just when the rest is gone.
        meters.set(M.UNREACHABLE, 1)
        _show_workers(meters, [])
    return Response(telemetry.exposition(others), media_type=CONTENT_TYPE)


def _show_workers(meters: Meters, workers: list[WorkerView]) -> None:
    for role in (PREFILL, DECODE):
        for state in ("ready", "draining"):
            count = sum(w.role == role and w.draining == (state == "draining") for w in workers)
            meters.set(M.LIVE_WORKERS, count, role=role, state=state)
