"""Documents by reference: only below the places that the operator allows, bounded, read whole.

A reference is checked twice: when the job is submitted, and when it is read. Redirects are not
followed (they could lead anywhere), links in files are (but not out of the allowed folder).
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import httpx

from penstock.errors import (
    DeadlineError,
    InvalidRequestError,
    PenstockError,
    PermissionDeniedError,
    UnavailableError,
)

_WEB = ("http", "https")
_LONGEST_URI = 4096
_PIECE_BYTES = 1 << 20


class Sources:
    """Reads documents. Holds no connection between two reads."""

    def __init__(self, allowed: Sequence[str], *, max_bytes: int, timeout_s: float) -> None:
        self._allowed = tuple(_normal(place) for place in allowed)
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s

    def check(self, uri: str) -> str:
        """Its one spelling. Raises InvalidRequestError or PermissionDeniedError."""
        normal = _normal(uri)
        if not any(normal.startswith(place) and normal != place for place in self._allowed):
            known = ", ".join(self._allowed) or "none"
            raise PermissionDeniedError(
                f"this server does not read {uri[:200]!a}; places that its operator allows "
                f"(batch.sources): {known}",
                code="source_not_allowed",
                param="document.uri",
            )
        return normal

    async def read(self, uri: str) -> bytes:
        """The document. Permanent failures are InvalidRequestErrors, others can be tried again."""
        normal = self.check(uri)
        try:
            async with asyncio.timeout(self._timeout_s):
                if normal.startswith("file://"):
                    return await asyncio.to_thread(self._read_file, normal)
                if urlsplit(normal).scheme in _WEB:
                    return await self._read_web(normal)
                return await asyncio.to_thread(self._read_remote, normal)
        except TimeoutError as error:
            raise DeadlineError(
                f"{uri[:200]!a} did not come within {self._timeout_s:.0f} s"
            ) from error

    def _read_file(self, uri: str) -> bytes:
        path = Path(os.path.realpath(unquote(urlsplit(uri).path)))
        folders = [
            Path(os.path.realpath(unquote(urlsplit(place).path)))
            for place in self._allowed
            if place.startswith("file://")
        ]
        if not any(path.is_relative_to(folder) for folder in folders):
            raise PermissionDeniedError(
                f"{uri[:200]!a} leads out of the allowed folders", code="source_not_allowed"
            )
        try:
            if not path.is_file():
                raise InvalidRequestError(f"there is no file at {uri[:200]!a}", code="no_document")
            with path.open("rb") as file:
                return self._bounded(file.read(self._max_bytes + 1), uri)
        except OSError as error:
            raise InvalidRequestError(
                f"cannot read {uri[:200]!a}: {error.strerror}", code="no_document"
            ) from error

    async def _read_web(self, uri: str) -> bytes:
        pieces, size = [], 0
        try:
            async with (
                httpx.AsyncClient(timeout=self._timeout_s, follow_redirects=False) as client,
                client.stream("GET", uri) as answer,
            ):
                _check_status(uri, answer.status_code)
                async for piece in answer.aiter_bytes(_PIECE_BYTES):
                    size += len(piece)
                    if size > self._max_bytes:
                        break
                    pieces.append(piece)
        except httpx.HTTPError as error:
            raise UnavailableError(
                f"cannot read {uri[:200]!a}: {type(error).__name__}", code="source_unavailable"
            ) from error
        return self._bounded(b"".join(pieces) if size <= self._max_bytes else None, uri)

    def _read_remote(self, uri: str) -> bytes:
        """Whatever fsspec knows: s3, gs, abfs, ... if their packages are installed."""
        import fsspec

        try:
            opened: Any = fsspec.open(uri, "rb")
            with opened as file:
                return self._bounded(file.read(self._max_bytes + 1), uri)
        except (ImportError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InvalidRequestError(
                f"cannot read {uri[:200]!a} here: {reason}", code="no_document"
            ) from error
        except FileNotFoundError as error:
            raise InvalidRequestError(
                f"there is nothing at {uri[:200]!a}", code="no_document"
            ) from error
        except PermissionError as error:
            raise InvalidRequestError(
                f"this server may not read {uri[:200]!a}; its credentials do not allow it",
                code="no_document",
            ) from error
        except OSError as error:
            raise UnavailableError(
                f"cannot read {uri[:200]!a}: {type(error).__name__}", code="source_unavailable"
            ) from error

    def _bounded(self, data: bytes | None, uri: str) -> bytes:
        if data is None or len(data) > self._max_bytes:
            raise InvalidRequestError(
                f"{uri[:200]!a} is larger than {self._max_bytes} bytes, the limit of a document",
                code="document_too_large",
            )
        return data


def _check_status(uri: str, status: int) -> None:
    if status == 200:
        return
    shown = f"{uri[:200]!a} answered {status}"
    if status in (408, 425, 429) or status >= 500:
        raise UnavailableError(f"{shown}; it is tried again", code="source_unavailable")
    hint = "; redirects are not followed, name the final address" if 300 <= status < 400 else ""
    raise InvalidRequestError(f"{shown}{hint}", code="no_document")


def _normal(uri: str) -> str:
    """One spelling for one place: no dots, no user, lower-case host. Raises InvalidRequestError."""
    wrong: PenstockError = InvalidRequestError(
        f"{uri[:200]!a} is no reference like file:///folder/name, https://host/path or "
        "s3://bucket/name",
        param="document.uri",
    )
    if len(uri) > _LONGEST_URI or not uri.isprintable() or "\\" in uri:
        raise wrong
    try:
        parts = urlsplit(uri)
        host, port = parts.hostname or "", parts.port
    except ValueError as error:
        raise wrong from error
    segments = unquote(parts.path).split("/")
    dotted = any(segment in (".", "..") for segment in segments) or "\0" in unquote(parts.path)
    is_file = parts.scheme == "file"
    if not parts.scheme or dotted or parts.username or parts.password or parts.fragment:
        raise wrong
    if is_file and (host not in ("", "localhost") or not parts.path.startswith("/")):
        raise wrong
    if not is_file and not host:
        raise wrong
    where = "" if is_file else host + (f":{port}" if port is not None else "")
    # Buckets are case-sensitive; hosts are not.
    if parts.scheme not in (*_WEB, "file"):
        where = parts.netloc
    query = f"?{parts.query}" if parts.query else ""
    return f"{parts.scheme}://{where}{parts.path}{query}"
