"""The client: what it needs, how it reconnects, the sync one, and `penstock batch`."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from cluster.cli.batch import read_job
from cluster.launchers.common import free_port
from cluster.tls.authority import new_authority, new_front
from penstock.client import AsyncBatchClient, BatchClient, Document, JobOptions, Question
from penstock.errors import PenstockError, UnavailableError, UsageError
from tests.cluster.batch.batch_harness import batch_front, documents


def test_importing_the_client_needs_grpc_and_protobuf_and_no_more() -> None:
    code = (
        "import sys; before = set(sys.modules); import penstock.client; "
        "print(sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(json.loads(found.stdout.replace("'", '"')))
    foreign = {m for m in loaded if m not in sys.stdlib_module_names and not m.startswith("_")}
    print(sorted(foreign))
    # grpc imports its own companions (grpc_health, ...) where they are installed.
    known = {"google", "protos", "penstock", "typing_extensions", "cython_runtime"}
    assert {name for name in foreign if not name.startswith("grpc")} <= known


async def test_a_watch_goes_on_through_a_restart_of_the_server(tmp_path: Path) -> None:
    port = free_port()
    async with AsyncBatchClient(f"127.0.0.1:{port}", retry_s=30) as client:
        async with batch_front(tmp_path, port=port) as batch:
            batch.service.plan.token_pause_s = 0.1
            job = await client.submit(documents(10, 2))
            watching = asyncio.create_task(_all(client, job.id))
            async for _ in client.results(job.id, wait=True):
                break
        await asyncio.sleep(0.3)
        async with batch_front(tmp_path, port=port):
            numbers = await asyncio.wait_for(watching, 30)
    print(numbers)
    assert sorted(numbers) == list(range(20))


async def _all(client: AsyncBatchClient, job_id: str) -> list[int]:
    return [r.number async for r in client.results(job_id, wait=True)]


async def test_a_submission_waits_for_its_server_and_is_there_once(tmp_path: Path) -> None:
    port = free_port()
    async with AsyncBatchClient(f"127.0.0.1:{port}", retry_s=30) as client:
        submitting = asyncio.create_task(client.submit(documents(2)))
        await asyncio.sleep(0.5)
        async with batch_front(tmp_path, port=port):
            job = await asyncio.wait_for(submitting, 20)
            assert [j.id for j in await client.list()] == [job.id]


async def test_patience_ends_with_cause_and_next_step() -> None:
    async with AsyncBatchClient(f"127.0.0.1:{free_port()}", retry_s=0.5) as client:
        with pytest.raises(UnavailableError, match="penstock serve --grpc-port"):
            await client.list()
    with pytest.raises(UsageError, match="HOST:PORT"):
        AsyncBatchClient("nowhere")
    with pytest.raises(UsageError, match="certificate"):
        AsyncBatchClient("h:1", ca="nothing.pem")


@pytest.mark.parametrize(
    "make",
    [
        lambda: Document(["?"]),
        lambda: Document(["?"], text="a", uri="b"),
        lambda: Document(["?"], path=Path("x"), text=""),
    ],
)
def test_a_document_has_exactly_one_source(make: object) -> None:
    with pytest.raises(ValueError, match="one of them"):
        make()  # type: ignore[operator]


class Serving(threading.Thread):
    """A batch front in a thread, for clients that block."""

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self._folder = folder
        self._ready = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._asked: asyncio.Event | None = None
        self.target = ""
        self.start()
        assert self._ready.wait(20)

    def run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        self._loop, self._asked = asyncio.get_running_loop(), asyncio.Event()
        async with batch_front(self._folder) as batch:
            self.target = batch.target
            self._ready.set()
            await self._asked.wait()

    def stop(self) -> None:
        assert self._loop is not None and self._asked is not None
        self._loop.call_soon_threadsafe(self._asked.set)
        self.join(20)


def test_the_sync_client_does_the_same(tmp_path: Path) -> None:
    serving = Serving(tmp_path)
    with BatchClient(serving.target, retry_s=10) as client:
        job = client.submit(documents(3), JobOptions(metadata={"a": "b"}))
        numbers = [r.number for r in client.results(job.id, wait=True)]
        done = client.wait(job.id)
        assert sorted(numbers) == list(range(6)) and done.state == "completed"
        assert [j.id for j in client.list()] == [job.id]
        for event in client.watch(job.id):
            print(event)
            break
        assert client.cancel(job.id).state == client.resume(job.id).state == "completed"
        with pytest.raises(PenstockError, match="there is no job"):
            client.get("job-none")
    with pytest.raises(RuntimeError, match="closed"):
        client.list()
    serving.stop()


def penstock(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cluster.cli", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_the_command_line_from_submit_to_results(tmp_path: Path) -> None:
    serving = Serving(tmp_path)
    (tmp_path / "doc.txt").write_text("a text in a file")
    job_file = tmp_path / "job.jsonl"
    rows = [
        {"job": {"max_tokens": 5, "idempotency_key": "k"}},
        {"path": "doc.txt", "questions": ["a?", {"text": "b?", "id": "second"}]},
        {"text": "here", "id": "inline", "questions": ["c?"]},
    ]
    job_file.write_text("\n".join(json.dumps(row) for row in rows))
    server = ("--server", serving.target)
    made = penstock("batch", "submit", str(job_file), *server, "--wait")
    assert made.returncode == 0, made.stderr
    job_id = made.stdout.strip()
    assert "3/3 questions" in made.stderr
    got = penstock("batch", "results", job_id, *server)
    lines = [json.loads(line) for line in got.stdout.splitlines()]
    print(got.stdout)
    assert {(row["document"], row["question"], row["text"]) for row in lines} == {
        ("doc.txt", "0", "yes"),
        ("doc.txt", "second", "yes"),
        ("inline", "0", "yes"),
    }
    again = penstock("batch", "submit", str(job_file), *server)
    assert again.stdout.strip() == job_id
    listed = penstock("batch", "list", *server, "--json")
    assert json.loads(listed.stdout)["succeeded"] == 3
    watched = penstock("batch", "watch", job_id, *server, "--results")
    assert watched.returncode == 0 and len(watched.stdout.splitlines()) == 3
    wrong = penstock("batch", "cancel", "job-none", *server)
    assert wrong.returncode == 1 and wrong.stderr.startswith("penstock: there is no job")
    serving.stop()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "holds no document"),
        ("{", "line 1 is not valid JSON"),
        ("[]", "must be an object"),
        ('{"job": {"max_token": 1}}', "max_token"),
        ('{"job": {"max_tokens": "x"}}', "wrong kind"),
        ('{"questions": ["?"]}', "one of path, text and uri"),
        ('{"text": "a", "uri": "b", "questions": []}', "one of path, text and uri"),
        ('{"text": "a", "question": "?"}', "does not know question"),
        ('{"text": "a", "questions": "?"}', "a list"),
        ('{"text": "a", "questions": [1]}', "a question is a string"),
        ('{"path": "nowhere", "questions": ["?"]}', "there is no document"),
    ],
)
def test_a_wrong_job_file_is_named_with_its_line(tmp_path: Path, text: str, sentence: str) -> None:
    file = tmp_path / "job.jsonl"
    file.write_text(text)
    with pytest.raises(UsageError, match=sentence):
        read_job(file)


def test_a_job_file_reads_back_as_what_it_says(tmp_path: Path) -> None:
    file = tmp_path / "job.jsonl"
    file.write_text('{"job": {"seed": 3}}\n\n{"uri": "s3://b/d", "questions": [{"text": "q"}]}\n')
    made, options, key = read_job(file)
    assert options.seed == 3 and key == ""
    assert made[0].uri == "s3://b/d" and list(made[0].questions) == [Question("q")]


async def test_tls_with_the_fronts_own_certificate(tmp_path: Path) -> None:
    authority = new_authority(30)
    pair = new_front(authority, ("127.0.0.1",), 30)
    files = {"ca.pem": authority.cert, "tls.pem": pair.cert, "tls.key": pair.key}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    front = {"tls_cert": str(tmp_path / "tls.pem"), "tls_key": str(tmp_path / "tls.key")}
    async with batch_front(tmp_path, front=front) as batch:
        async with batch.client(ca=tmp_path / "ca.pem") as client:
            job = await client.submit(documents(1))
            assert (await client.wait(job.id)).succeeded == 2
        for wrong in ({}, {"tls": True}):
            async with batch.client(retry_s=0.2, **wrong) as client:
                with pytest.raises(UnavailableError, match="cannot be reached"):
                    await client.list()
