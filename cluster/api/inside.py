"""A request of this server to itself: through every route and check but network and key."""

from __future__ import annotations

import asyncio
import contextlib

import orjson
from starlette.types import ASGIApp, Message

from cluster.api.scope import INSIDE
from cluster.auth.contracts import Caller
from cluster.batch.lines import Answered


class InsideCalls:
    """Calls `app`, whose job it stays to limit and count."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, path: str, body: bytes, caller: Caller) -> Answered:
        """Cancelling it is the client hanging up."""
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [
                (b"content-type", b"application/json"),
                (b"content-length", str(len(body)).encode()),
            ],
            "client": None,
            "server": None,
            INSIDE: caller,
        }
        gone = asyncio.Event()
        given = False
        status, headers, pieces = 0, dict[bytes, bytes](), list[bytes]()

        async def receive() -> Message:
            nonlocal given
            if not given:
                given = True
                return {"type": "http.request", "body": body, "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            nonlocal status, headers
            if message["type"] == "http.response.start":
                status, headers = message["status"], dict(message.get("headers", ()))
            elif message["type"] == "http.response.body":
                pieces.append(message.get("body", b""))

        try:
            await self._app(scope, receive, send)
        finally:
            gone.set()
        content = {}
        with contextlib.suppress(orjson.JSONDecodeError):
            content = orjson.loads(b"".join(pieces))
        retry = headers.get(b"retry-after", b"").decode()
        return Answered(
            status=status or 500,
            body=content if isinstance(content, dict) else {},
            request_id=headers.get(b"x-request-id", b"").decode(),
            retry_after_s=float(retry) if retry.isdigit() else None,
        )
