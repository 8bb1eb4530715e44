"""Around every request: its id, the API key and its limits, a count of the response, and the last
safety net.
"""

from __future__ import annotations

import logging
import secrets
import time
from contextlib import AbstractContextManager

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.api import errors
from cluster.api.state import ApiState
from cluster.auth.contracts import ApiScope
from cluster.auth.limiter import Admission
from cluster.auth.metered import charged_to
from penstock.errors import InvalidRequestError, PenstockError
from penstock.telemetry import request_scope
from penstock.telemetry.trace import Span

_log = logging.getLogger(__name__)
LONGEST_ID = 128
INSIDE = "penstock.inside"
"""In a scope: the caller is known already. No request from outside can put it there."""
# Uploads are written away as they come.
_ON_DISK = "/v1/files"
_OPEN_PATHS = frozenset(
    {"/", "/health", "/ready", "/version", "/metrics", "/docs", "/openapi.json"}
)
_OPEN_PREFIX = "/page/"
"""The page's own files; what it shows comes from paths that ask for the key."""
# Asked once a second by whoever watches, at a bounded cost: no quota and no trace is meant for it.
_WATCHED = "/cluster"
# What a key must be allowed to do, by the beginning of the path; elsewhere any valid key will do.
_SCOPES: tuple[tuple[str, ApiScope], ...] = (
    ("/v1/chat/", "generate"),
    ("/v1/completions", "generate"),
    ("/v1/files", "batch"),
    ("/v1/batches", "batch"),
    ("/v1/models", "read"),
    ("/cluster", "read"),
    ("/tokenize", "read"),
    ("/detokenize", "read"),
)


def is_open(path: str) -> bool:
    """Whether `path` asks for no key."""
    return path in _OPEN_PATHS or path.startswith(_OPEN_PREFIX)


class RequestScope:
    """Pure ASGI, so that streams and disconnects pass through untouched."""

    def __init__(self, app: ASGIApp, state: ApiState) -> None:
        self._app = app
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.monotonic()
        given = _header(scope, b"x-request-id")
        wrong_id = given is not None and not _acceptable(given)
        request_id = f"req-{secrets.token_hex(12)}" if given is None or wrong_id else given
        header = (b"x-request-id", request_id.encode())
        status = 0
        admission: Admission | None = None
        on_disk = scope["path"].startswith(_ON_DISK)
        receive, release = self._state.bodies.guard(receive, counted=not on_disk)

        async def tagged(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), header]
                caller = scope.get("penstock.caller")
                if caller is not None:
                    limits = self._state.limiter.headers(caller).items()
                    message["headers"] += [(k.encode(), v.encode()) for k, v in limits]
            elif admission is not None and not message.get("more_body"):
                # Before the last byte goes: who has read it may ask again at once.
                admission.leave()
            await send(message)

        with request_scope(request_id), self._span(scope, request_id) as span:
            try:
                admission = self._admit(scope, wrong_id)
                _refuse_encoded(scope)
                with charged_to(admission):
                    await self._app(scope, receive, tagged)
            except PenstockError as error:
                self._state.telemetry.failed(error)
                if not status:
                    await errors.response(error)(scope, receive, tagged)
            except Exception:
                _log.exception("unexpected failure of %s %s", scope["method"], scope["path"])
                self._state.telemetry.failed(errors.unexpected())
                if not status:
                    await errors.response(errors.unexpected())(scope, receive, tagged)
            finally:
                release()
                if admission is not None:
                    admission.leave()
                self._count(scope, status, time.monotonic() - started)
                if span is not None:
                    route = getattr(scope.get("route"), "path", "other")
                    span.rename(f"{scope['method']} {route}")
                    span.note(http__route=route, http__response__status_code=status or 499)

    def _span(self, scope: Scope, request_id: str) -> AbstractContextManager[Span | None]:
        """Requests that make work are traced, probes and scrapes are not."""
        path: str = scope["path"]
        begin = not (is_open(path) or path == _WATCHED)
        return self._state.telemetry.tracer.entry(
            scope["method"],
            scope["headers"] if begin else (),
            may_begin=begin,
            penstock__request_id=request_id,
        )

    def _admit(self, scope: Scope, wrong_id: bool) -> Admission | None:
        """None: the path is open to all."""
        if wrong_id:
            raise InvalidRequestError(
                f"X-Request-Id must be 1 to {LONGEST_ID} printable ASCII characters",
                param="X-Request-Id",
                code="invalid_request_id",
            )
        scope["penstock.tenant"] = "default"
        path: str = scope["path"]
        if is_open(path):
            return None
        # A line of a batch: its key was checked when the batch came.
        caller = scope.get(INSIDE) or self._state.authenticator.authenticate(
            _header(scope, b"authorization")
        )
        scope["penstock.tenant"] = caller.tenant
        scope["penstock.caller"] = caller
        for prefix, wanted in _SCOPES:
            if path.startswith(prefix):
                caller.require(wanted)
        return None if path == _WATCHED else self._state.limiter.enter(caller)

    def _count(self, scope: Scope, status: int, took_s: float) -> None:
        route = scope.get("route")
        path = getattr(route, "path", "other")
        self._state.telemetry.responded(path, status or 499)
        _log.info(
            "%s %s",
            scope["method"],
            path,
            extra={"facts": {"status": status or 499, "took_s": round(took_s, 6)}},
        )


def _refuse_encoded(scope: Scope) -> None:
    """Nothing here unpacks: a small body can never become a large one."""
    encoding = _header(scope, b"content-encoding")
    if encoding is not None and encoding.strip().lower() not in ("", "identity"):
        raise errors.HttpError(
            415,
            f"content-encoding {encoding[:40]!a} is not accepted; send the body as it is",
            code="unsupported_content_encoding",
        )


def _header(scope: Scope, name: bytes) -> str | None:
    for key, value in scope["headers"]:
        if key == name:
            text: str = value.decode("latin-1")
            return text
    return None


def _acceptable(request_id: str) -> bool:
    in_bounds = 1 <= len(request_id) <= LONGEST_ID
    return in_bounds and request_id.isascii() and request_id.isprintable() and " " not in request_id
