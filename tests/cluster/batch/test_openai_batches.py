"""`/v1/files` and `/v1/batches` through the openai client: its own types parse every answer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types import Batch as BatchObject
from openai.types import FileObject

from cluster.auth.key_file import add_key
from cluster.auth.keys import new_key
from cluster.batch.lines import LineReader, groups_of
from penstock.errors import InvalidRequestError, WorkerUnavailableError
from tests.cluster.batch.batch_harness import Batch, batch_front, documents

CHAT = "/v1/chat/completions"


def client_of(batch: Batch, key: str = "none") -> openai.AsyncOpenAI:
    transport = httpx.ASGITransport(batch.app)
    web = httpx.AsyncClient(transport=transport, base_url="http://api/v1")
    return openai.AsyncOpenAI(api_key=key, base_url="http://api/v1", http_client=web, max_retries=0)


@pytest.fixture
async def batch(tmp_path: Path) -> AsyncIterator[Batch]:
    async with batch_front(tmp_path) as made:
        yield made


def line(number: int, text: str = "hello", url: str = CHAT, **body: Any) -> dict[str, Any]:
    said = {"model": "fake", "messages": [{"role": "user", "content": text}], **body}
    return {"custom_id": f"r{number}", "method": "POST", "url": url, "body": said}


def jsonl(*rows: dict[str, Any]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


async def finished(client: openai.AsyncOpenAI, batch_id: str) -> BatchObject:
    for _ in range(400):
        found = await client.batches.retrieve(batch_id)
        if found.status in ("completed", "cancelled"):
            return found
        await asyncio.sleep(0.05)
    raise AssertionError(f"{batch_id} did not end")


async def lines_of(client: openai.AsyncOpenAI, file_id: str | None) -> list[dict[str, Any]]:
    assert file_id is not None
    return [json.loads(row) for row in (await client.files.content(file_id)).text.splitlines()]


async def test_a_batch_from_upload_to_output(batch: Batch) -> None:
    client = client_of(batch)
    content = jsonl(line(0, max_tokens=3), line(1, "again"), line(2, model="nope"))
    file = await client.files.create(file=("in.jsonl", content), purpose="batch")
    assert (file.bytes, file.filename, file.status) == (len(content), "in.jsonl", "processed")
    assert (await client.files.content(file.id)).content == content
    made = await client.batches.create(
        input_file_id=file.id, endpoint=CHAT, completion_window="24h", metadata={"a": "b"}
    )
    BatchObject.model_validate(made.model_dump(), strict=True)
    await client.files.delete(file.id)
    done = await finished(client, made.id)
    print(done)
    assert done.request_counts is not None and done.metadata == {"a": "b"}
    counts = done.request_counts
    assert (counts.total, counts.completed, counts.failed) == (3, 2, 1)
    good = await lines_of(client, done.output_file_id)
    assert {row["custom_id"] for row in good} == {"r0", "r1"}
    for row in good:
        answer = openai.types.chat.ChatCompletion.model_validate(row["response"]["body"])
        assert answer.choices[0].message.content == "yes" and row["error"] is None
        assert row["response"]["status_code"] == 200 and row["response"]["request_id"]
    (bad,) = await lines_of(client, done.error_file_id)
    assert bad["custom_id"] == "r2" and bad["response"]["status_code"] == 404
    assert bad["response"]["body"]["error"]["code"] == "model_not_found"
    for file_id in (done.output_file_id, done.error_file_id):
        assert file_id is not None
        told = FileObject.model_validate((await client.files.retrieve(file_id)).model_dump())
        raw = (await client.files.content(file_id)).content
        assert told.bytes == len(raw) and told.purpose == "batch_output"
    assert done.usage is not None and done.usage.output_tokens == 2


async def test_text_completions_too(batch: Batch) -> None:
    client = client_of(batch)
    row = line(0, url="/v1/completions") | {"body": {"model": "fake", "prompt": "say"}}
    file = await client.files.create(file=("x", jsonl(row)), purpose="batch")
    made = await client.batches.create(
        input_file_id=file.id, endpoint="/v1/completions", completion_window="24h"
    )
    (got,) = await lines_of(client, (await finished(client, made.id)).output_file_id)
    assert openai.types.Completion.model_validate(got["response"]["body"]).choices[0].text == "yes"


async def test_cancel_lists_and_pages(batch: Batch) -> None:
    batch.service.plan.token_pause_s = 0.2
    client = client_of(batch)
    file = await client.files.create(
        file=("x", jsonl(*(line(n) for n in range(40)))), purpose="batch"
    )
    first = await client.batches.create(
        input_file_id=file.id, endpoint=CHAT, completion_window="24h"
    )
    async with batch.client() as grpc_client:
        job = await grpc_client.submit(documents(1))
    second = await client.batches.create(
        input_file_id=file.id, endpoint=CHAT, completion_window="24h"
    )
    cancelled = await client.batches.cancel(first.id)
    assert cancelled.status == "cancelled" and cancelled.cancelled_at
    opened = batch.service.opened
    await client.batches.cancel(second.id)
    await asyncio.sleep(0.3)
    assert batch.service.opened <= opened + 2, "the gRPC job may start, cancelled batches do not"
    listed = await client.batches.list(limit=1)
    assert [b.id for b in listed.data] == [second.id] and listed.has_more
    everything = [b.id async for b in await client.batches.list(limit=1)]
    assert everything == [second.id, first.id], "gRPC jobs are no batches"
    with pytest.raises(openai.NotFoundError):
        await client.batches.retrieve(job.id)
    assert [f.id async for f in await client.files.list(purpose="batch")] == [file.id]
    assert (await client.files.list(purpose="vision")).data == []


async def test_what_fails_for_a_moment_is_asked_again(batch: Batch) -> None:
    batch.service.plan.refuse = WorkerUnavailableError("gone")
    client = client_of(batch)
    file = await client.files.create(file=("x", jsonl(line(0), line(1))), purpose="batch")
    made = await client.batches.create(
        input_file_id=file.id, endpoint=CHAT, completion_window="24h"
    )
    await asyncio.sleep(0.8)
    batch.service.plan.refuse = None
    done = await finished(client, made.id)
    assert done.request_counts is not None and done.request_counts.completed == 2


async def test_batches_outlive_the_front_and_the_input(tmp_path: Path) -> None:
    async with batch_front(tmp_path) as first:
        first.service.plan.token_pause_s = 0.2
        client = client_of(first)
        rows = jsonl(*(line(n, "z" * 100) for n in range(12)))
        file = await client.files.create(file=("x", rows), purpose="batch")
        made = await client.batches.create(
            input_file_id=file.id, endpoint=CHAT, completion_window="24h"
        )
        await client.files.delete(file.id)
        await asyncio.sleep(0.3)
    async with batch_front(tmp_path) as second:
        client = client_of(second)
        done = await finished(client, made.id)
        ids = [row["custom_id"] for row in await lines_of(client, done.output_file_id)]
    assert sorted(ids) == sorted(f"r{n}" for n in range(12))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"\n\n", "no request"),
        (b"{", "line 1 of the input file is not valid JSON"),
        (b"[]", "custom_id"),
        (jsonl(line(0), line(0)), "line 2 of the input file has the custom_id 'r0'"),
        (jsonl(line(0) | {"method": "GET"}), "POST"),
        (jsonl(line(0, url="/v1/embeddings")), "must have the url"),
        (jsonl(line(0) | {"body": "x"}), "body"),
        (jsonl(line(0, stream=True)), "stream"),
    ],
)
async def test_a_wrong_line_is_refused_with_its_number(
    batch: Batch, content: bytes, sentence: str
) -> None:
    client = client_of(batch)
    file = await client.files.create(file=("x", content), purpose="batch")
    with pytest.raises(openai.BadRequestError) as caught:
        await client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
    print(caught.value.message)
    assert sentence in caught.value.message and caught.value.param == "input_file_id"
    assert [b async for b in await client.batches.list()] == []


async def test_wrong_calls_are_errors_of_the_usual_form(tmp_path: Path) -> None:
    async with batch_front(tmp_path, max_file_bytes=2048) as batch:
        client = client_of(batch)
        with pytest.raises(openai.BadRequestError, match="empty"):
            await client.files.create(file=("x", b""), purpose="batch")
        with pytest.raises(openai.BadRequestError, match="purpose"):
            await client.files.create(file=("x", b"a"), purpose="other")  # type: ignore[arg-type]
        with pytest.raises(openai.APIStatusError) as caught:
            await client.files.create(file=("x", b"a" * 4096), purpose="batch")
        assert caught.value.status_code == 413
        for call in (client.files.retrieve("file-x"), client.files.delete("file-x")):
            with pytest.raises(openai.NotFoundError):
                await call
        with pytest.raises(openai.NotFoundError):
            await client.files.content("file-output-batch_x")
        for method, path, body in (
            ("POST", "/v1/files", {"content": b"x"}),
            ("POST", "/v1/files", {"files": {"other": b"x"}}),
            ("POST", "/v1/files", {"headers": {"content-type": "multipart/form-data"}}),
            (
                "POST",
                "/v1/files",
                {
                    "content": b"--b\r\nbroken",
                    "headers": {"content-type": "multipart/form-data; boundary=b"},
                },
            ),
            ("POST", "/v1/batches", {"content": b"{}"}),
            ("POST", "/v1/batches", {"json": {"input_file_id": "f", "endpoint": "/x"}}),
            ("GET", "/v1/batches?limit=0", {}),
            ("POST", "/v1/files", {"files": [("file", b"x"), ("file", b"y")]}),
            ("GET", "/v1/files?limit=x", {}),
            ("GET", f"/v1/files?limit={'1' * 5000}", {}),
            ("GET", "/v1/files?order=up", {}),
        ):
            answer = await client._client.request(method, f"http://api{path}", **body)  # type: ignore[arg-type]
            error = answer.json()["error"]
            print(method, path, answer.status_code, error["message"])
            assert answer.status_code == 400 and set(error) == {"message", "type", "param", "code"}


async def test_files_and_batches_belong_to_their_tenant_and_scope(tmp_path: Path) -> None:
    keys = tmp_path / "keys.yaml"
    made = {}
    for name, tenant, scope in (
        ("a", "acme", "batch"),
        ("b", "else", "batch"),
        ("c", "acme", "read"),
    ):
        fresh = new_key(tenant=tenant, name=name, scopes=[scope])
        made[name] = add_key(keys, lambda _, fresh=fresh: fresh).text  # type: ignore[misc]
    async with batch_front(tmp_path, front={"api_keys_file": str(keys)}) as batch:
        one, other, reader = (client_of(batch, made[name]) for name in "abc")
        with pytest.raises(openai.PermissionDeniedError):
            await reader.files.list()
        file = await one.files.create(file=("x", jsonl(line(0))), purpose="batch")
        job = await one.batches.create(
            input_file_id=file.id, endpoint=CHAT, completion_window="24h"
        )
        # The key may run batches only; their lines are answered all the same.
        done = await finished(one, job.id)
        assert done.request_counts is not None and done.request_counts.completed == 1
        for call in (
            other.files.retrieve(file.id),
            other.batches.retrieve(job.id),
            other.batches.cancel(job.id),
            other.files.content(str(done.output_file_id)),
            other.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h"),
        ):
            with pytest.raises(openai.NotFoundError):
                await call
        assert (await other.files.list()).data == []


async def test_lines_about_one_long_document_wait_for_its_first(batch: Batch) -> None:
    batch.service.plan.prefill_pause_s = 0.1
    document = "d" * 5000
    client = client_of(batch)
    rows = [line(n, f"{document}\n\nQuestion: {n}?") for n in range(4)]
    file = await client.files.create(file=("x", jsonl(*rows)), purpose="batch")
    made = await client.batches.create(
        input_file_id=file.id, endpoint=CHAT, completion_window="24h"
    )
    await asyncio.sleep(0.15)
    assert batch.service.opened == 1, "the others would each compute the document"
    done = await finished(client, made.id)
    assert done.request_counts is not None and done.request_counts.completed == 4


@given(
    st.lists(st.sampled_from(["", "a", "b", "A" * 5000, "B" * 5000, "B" * 5001]), max_size=12),
    st.integers(1, 50),
)
def test_any_cut_reads_the_same_lines_and_every_line_is_in_one_group(
    texts: list[str], step: int
) -> None:
    content = jsonl(*(line(n, text) for n, text in enumerate(texts)))
    step *= 97

    def read(size: int) -> list[Any]:
        reader = LineReader(endpoint=CHAT, most_lines=100, most_line_bytes=1 << 20)
        for start in range(0, len(content), size):
            reader.feed(content[start : start + size])
        return reader.close()

    if not texts:
        with pytest.raises(InvalidRequestError):
            read(10)
        return
    lines = read(step)
    assert lines == read(len(content))
    for each in lines:
        assert (
            json.loads(content[each.at : each.at + each.size_bytes])["custom_id"] == each.custom_id
        )
    groups = list(groups_of(lines))
    ids = sorted(item.id for group in groups for item in group.items)
    assert ids == sorted(each.custom_id for each in lines)
    long = [t for t in texts if len(t) > 4096]
    assert len(groups) == len(texts) - len(long) + len({t[:4096] for t in long})
