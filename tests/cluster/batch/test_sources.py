"""Documents by reference: what is allowed is read, all else is refused with a reason."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.batch.config import BatchSection
from cluster.batch.sources import Sources
from penstock.client import Document
from penstock.errors import (
    DeadlineError,
    InvalidRequestError,
    PenstockError,
    PermissionDeniedError,
    UnavailableError,
)
from tests.cluster.batch.batch_harness import batch_front


def sources(*allowed: str, max_bytes: int = 1000, timeout_s: float = 5.0) -> Sources:
    return Sources(allowed, max_bytes=max_bytes, timeout_s=timeout_s)


@pytest.fixture
async def web() -> AsyncIterator[tuple[str, list[str]]]:
    """A server of a few pages; the second value lists the paths that were asked for."""
    asked: list[str] = []
    pages = {
        "/docs/a.txt": b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
        "/docs/huge": b"HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\n" + b"x" * 99999,
        "/docs/away": b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/secret\r\n"
        b"Content-Length: 0\r\n\r\n",
        "/docs/busy": b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n",
    }

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        path = (await reader.readline()).split()[1].decode()
        asked.append(path)
        if path == "/docs/slow":
            await asyncio.sleep(30)
        gone = b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"
        writer.write(pages.get(path, gone))
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}", asked
    server.close()


async def test_files_below_the_allowed_folder_and_no_others(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "out"
    for folder in (inside, outside):
        folder.mkdir()
    (inside / "a b.txt").write_text("inside")
    (inside / "large").write_bytes(b"x" * 1001)
    (outside / "secret").write_text("outside")
    (inside / "link").symlink_to(outside / "secret")
    os.mkfifo(inside / "pipe.txt")
    made = sources(f"file://{inside}/")
    assert await made.read(f"file://{inside}/a%20b.txt") == b"inside"
    for uri, kind in (
        (f"file://{outside}/secret", PermissionDeniedError),
        (f"file://{inside}/../out/secret", InvalidRequestError),
        (f"file://{inside}/%2e%2e/out/secret", InvalidRequestError),
        (f"file://{inside}/link", PermissionDeniedError),
        (f"file://{inside}/nothing", InvalidRequestError),
        (f"file://{inside}/pipe.txt", InvalidRequestError),
        (f"file://{inside}/", PermissionDeniedError),
        (f"file://{inside}/large", InvalidRequestError),
        (f"file://{inside}evil/x", PermissionDeniedError),
        ("file:///etc/passwd", PermissionDeniedError),
    ):
        with pytest.raises(kind) as caught:
            await made.read(uri)
        print(uri, "->", caught.value)


async def test_the_web_below_the_allowed_place(web: tuple[str, list[str]]) -> None:
    base, asked = web
    made = sources(f"{base}/docs/", timeout_s=1.0)
    assert await made.read(f"{base}/docs/a.txt") == b"hello"
    asked.clear()
    for uri, kind, word in (
        (f"{base}/docs/none", InvalidRequestError, "404"),
        (f"{base}/docs/huge", InvalidRequestError, "larger than"),
        (f"{base}/docs/away", InvalidRequestError, "redirects are not followed"),
        (f"{base}/docs/busy", UnavailableError, "tried again"),
        (f"{base}/docs/slow", DeadlineError, "within 1 s"),
        (f"{base}/other", PermissionDeniedError, "batch.sources"),
        (f"{base}.evil.test/docs/a.txt", InvalidRequestError, "no reference"),
        ("http://evil.test/docs/a.txt", PermissionDeniedError, "batch.sources"),
        (base.replace("//", "//127.0.0.1@evil.test/"), InvalidRequestError, "no reference"),
        ("http://127.0.0.1:1/docs/a.txt", PermissionDeniedError, "batch.sources"),
    ):
        with pytest.raises(kind, match=word):
            await made.read(uri)
    print(asked)
    assert not any(path == "/other" or "secret" in path for path in asked)


async def test_other_stores_come_through_fsspec() -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe("/bucket/doc", b"from a bucket")
    memory.pipe("/bucket/large", b"x" * 2000)
    made = sources("memory://bucket/", "nosuch://x/")
    assert await made.read("memory://bucket/doc") == b"from a bucket"
    for uri, word in (
        ("memory://bucket/none", "nothing at"),
        ("memory://bucket/large", "larger than"),
        ("nosuch://x/y", "cannot read"),
    ):
        with pytest.raises(InvalidRequestError, match=word):
            await made.read(uri)
    with pytest.raises(PermissionDeniedError):
        await made.read("memory://other/doc")


@given(st.text(max_size=60))
def test_no_text_gets_past_an_allow_list_by_being_odd(text: str) -> None:
    made = sources("https://host.test/docs/", "file:///data/")
    for uri in (text, f"https://host.test/{text}", f"file:///data{text}"):
        try:
            normal = made.check(uri)
        except PenstockError:
            continue
        assert normal.startswith(("https://host.test/docs/", "file:///data/"))
        assert "/../" not in normal and "@" not in normal.split("/")[2]


async def test_a_job_reads_references_and_names_what_it_may_not(tmp_path: Path) -> None:
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "a.txt").write_text("from a file")
    front = batch_front(tmp_path, sources=(f"file://{folder}/",))
    async with front as batch, batch.client() as client:
        with pytest.raises(PermissionDeniedError, match="does not read"):
            await client.submit([Document.from_uri("file:///etc/passwd", ["?"])])
        job = await client.submit(
            [
                Document.from_uri(f"file://{folder}/a.txt", ["q?"]),
                Document.from_uri(f"file://{folder}/gone.txt", ["a?", "b?"]),
            ]
        )
        results = {r.number: r async for r in client.results(job.id, wait=True)}
    assert results[0].text == "yes" and results[0].document_id.endswith("a.txt")
    assert [results[n].error.code for n in (1, 2)] == ["no_document"] * 2  # type: ignore[union-attr]
    assert "from a file" in bytes(batch.service.requests[0].token_ids).decode()


@pytest.mark.parametrize("wrong", ["/data/", "file:///data", "https://", "x"])
def test_a_place_that_is_none_is_refused_at_start(wrong: str) -> None:
    with pytest.raises(ValueError, match="slash at the end"):
        BatchSection(sources=(wrong,))
