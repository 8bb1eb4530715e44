"""The page at `/`: files that ship with the package, served from memory. Works offline.

The policy below allows nothing but the page's own files: no inline script or style, no other
origin, no frame. The page writes text into the document as text only (`static/`), so neither a
document nor an answer can become markup.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.resources import files

from fastapi import APIRouter, Request, Response

from cluster.api.errors import HttpError

router = APIRouter(include_in_schema=False)
INDEX = "index.html"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
_HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    # A new version must show at once; the tag makes that cheap.
    "cache-control": "no-cache",
}


@dataclass(frozen=True)
class PageFile:
    content: bytes
    media_type: str
    tag: str


class Page:
    """All files of the page, read once."""

    def __init__(self) -> None:
        folder = files("cluster.api").joinpath("static")
        self.files = {
            entry.name: _read(entry.name, entry.read_bytes())
            for entry in folder.iterdir()
            if "." + entry.name.rpartition(".")[2] in _TYPES
        }

    @property
    def paths(self) -> frozenset[str]:
        """Open to everyone: they hold nothing but the page."""
        return frozenset({"/", *(f"/page/{name}" for name in self.files if name != INDEX)})

    def response(self, name: str, request: Request) -> Response:
        found = self.files.get(name)
        if found is None:
            raise HttpError(404, "there is no such file of the page", code="unknown_url")
        headers = {**_HEADERS, "etag": found.tag}
        if request.headers.get("if-none-match") == found.tag:
            return Response(status_code=304, headers=headers)
        return Response(found.content, media_type=found.media_type, headers=headers)


def _read(name: str, content: bytes) -> PageFile:
    media_type = _TYPES["." + name.rpartition(".")[2]]
    return PageFile(content, media_type, f'"{hashlib.sha256(content).hexdigest()[:32]}"')


def _page(request: Request) -> Page:
    page: Page = request.app.state.page
    return page


@router.api_route("/", methods=["GET", "HEAD"])
async def index(request: Request) -> Response:
    return _page(request).response(INDEX, request)


@router.api_route("/page/{name}", methods=["GET", "HEAD"])
async def part(request: Request, name: str) -> Response:
    return _page(request).response(name, request)
