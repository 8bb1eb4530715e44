"""`penstock batch`: submit, watch, results, cancel, resume, list. The gRPC client and no more."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import orjson
import typer

from penstock.errors import PenstockError, UsageError

if TYPE_CHECKING:
    from penstock.client import BatchClient, Document, Job, JobOptions, Result

JobId = Annotated[str, typer.Argument(metavar="ID", help="The job.")]
Server = Annotated[
    str,
    typer.Option(
        metavar="HOST:PORT",
        envvar="PENSTOCK_BATCH_SERVER",
        help="The --grpc-port of `penstock serve`.",
    ),
]
ApiKey = Annotated[
    str | None, typer.Option(envvar="PENSTOCK_API_KEY", help="Key with the scope `batch`.")
]
Ca = Annotated[Path | None, typer.Option(help="Certificate to trust, PEM; means TLS.")]
Tls = Annotated[bool, typer.Option("--tls", help="TLS with the system's certificates.")]
Cursor = Annotated[int, typer.Option(help="Only results after this cursor.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object a line.")]
DEFAULT_SERVER = "127.0.0.1:8001"


def register(app: typer.Typer) -> None:
    group = typer.Typer(
        help="Jobs over long documents (docs/batch.md).",
        no_args_is_help=True,
        rich_markup_mode=None,
    )
    group.command("submit", help="Send a job and print its id.")(submit)
    group.command("watch", help="Follow a job until it has ended.")(watch)
    group.command("results", help="Print results as JSONL.")(results)
    group.command("cancel", help="Start no further question; answers stay.")(cancel)
    group.command("resume", help="Let a cancelled job go on.")(resume)
    group.command("list", help="Jobs, newest first.")(list_jobs)
    app.add_typer(group, name="batch")


def submit(
    job: Annotated[Path, typer.Argument(metavar="JOB.jsonl", help="One document a line.")],
    server: Server = DEFAULT_SERVER,
    api_key: ApiKey = None,
    ca: Ca = None,
    tls: Tls = False,
    idempotency_key: Annotated[
        str | None, typer.Option(help="The same key again is the same job.")
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Follow it until it has ended.")] = False,
) -> int:
    documents, options, key = read_job(job)
    with _client(server, api_key, ca, tls) as client:
        made = client.submit(documents, options, idempotency_key=idempotency_key or key)
        typer.echo(made.id)
        return _follow(client, made.id, cursor=0, out=None) if wait else 0


def watch(
    job: JobId,
    server: Server = DEFAULT_SERVER,
    api_key: ApiKey = None,
    ca: Ca = None,
    tls: Tls = False,
    with_results: Annotated[
        bool, typer.Option("--results", help="Print results as they come, as JSONL.")
    ] = False,
    cursor: Cursor = 0,
) -> int:
    with _client(server, api_key, ca, tls) as client:
        return _follow(client, job, cursor=cursor, out=sys.stdout if with_results else None)


def results(
    job: JobId,
    server: Server = DEFAULT_SERVER,
    api_key: ApiKey = None,
    ca: Ca = None,
    tls: Tls = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File instead of standard output.")
    ] = None,
    cursor: Cursor = 0,
    wait: Annotated[bool, typer.Option("--wait", help="Until the job has ended.")] = False,
) -> int:
    with _client(server, api_key, ca, tls) as client, _output(output) as out:
        if wait:
            return _follow(client, job, cursor=cursor, out=out)
        for result in client.results(job, cursor=cursor):
            _write(out, result)
    return 0


def cancel(
    job: JobId,
    server: Server = DEFAULT_SERVER,
    api_key: ApiKey = None,
    ca: Ca = None,
    tls: Tls = False,
) -> int:
    with _client(server, api_key, ca, tls) as client:
        typer.echo(_line(client.cancel(job)))
    return 0


def resume(
    job: JobId,
    server: Server = DEFAULT_SERVER,
    api_key: ApiKey = None,
    ca: Ca = None,
    tls: Tls = False,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Ask again what has failed.")
    ] = False,
) -> int:
    with _client(server, api_key, ca, tls) as client:
        typer.echo(_line(client.resume(job, retry_failed=retry_failed)))
    return 0


def list_jobs(
    server: Server = DEFAULT_SERVER,
    api_key: ApiKey = None,
    ca: Ca = None,
    tls: Tls = False,
    limit: Annotated[int, typer.Option(min=1, max=100, help="Most jobs.")] = 20,
    as_json: Json = False,
) -> int:
    with _client(server, api_key, ca, tls) as client:
        for job in client.list(limit=limit):
            typer.echo(orjson.dumps(facts(job)) if as_json else _line(job))
    return 0


def read_job(path: Path) -> tuple[list[Document], JobOptions, str]:
    """Documents, options and idempotency key of a job file. Raises UsageError with the line."""
    from penstock.client import JobOptions

    documents: list[Document] = []
    options, key = JobOptions(), ""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UsageError(f"cannot read the job {path}: {error.strerror}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            raise UsageError(f"{where} is not valid JSON: {error}") from error
        if not isinstance(row, dict):
            raise UsageError(f"{where} must be an object")
        if set(row) == {"job"} and not documents:
            options, key = _options(row["job"], where)
        else:
            documents.append(_document(row, where, path.parent))
    if not documents:
        raise UsageError(f"{path} holds no document; docs/batch.md shows the format")
    return documents, options, key


def _options(row: Any, where: str) -> tuple[JobOptions, str]:
    from penstock.client import JobOptions

    known = {f.name for f in fields(JobOptions)} | {"idempotency_key"}
    if not isinstance(row, dict) or set(row) - known:
        unknown = sorted(set(row) - known) if isinstance(row, dict) else [str(row)]
        raise UsageError(
            f"{where}: job does not know {', '.join(unknown)}; known are {', '.join(sorted(known))}"
        )
    try:
        options = JobOptions(**{k: v for k, v in row.items() if k != "idempotency_key"})
        # Wrong types show here, with the line, and not in the middle of the upload.
        options.message("")
    except (TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"{where}: job has a field of the wrong kind ({error})") from error
    return options, str(row.get("idempotency_key", ""))


def _document(row: dict[str, Any], where: str, folder: Path) -> Document:
    from penstock.client import Document, Question

    given = [name for name in ("path", "text", "uri") if name in row]
    unknown = set(row) - {"path", "text", "uri", "id", "questions"}
    if len(given) != 1 or unknown:
        raise UsageError(
            f"{where} must have one of path, text and uri, and questions"
            + (f"; it does not know {', '.join(sorted(unknown))}" if unknown else "")
        )
    source, name, asked = row[given[0]], row.get("id", ""), row.get("questions")
    if not isinstance(source, str) or not isinstance(name, str) or not isinstance(asked, list):
        raise UsageError(f"{where}: {given[0]} and id must be strings, questions a list")
    questions: list[Question | str] = []
    for question in asked:
        if isinstance(question, dict) and set(question) <= {"text", "id"} and "text" in question:
            questions.append(Question(str(question["text"]), str(question.get("id", ""))))
        elif isinstance(question, str):
            questions.append(question)
        else:
            raise UsageError(f'{where}: a question is a string or {{"text": ..., "id": ...}}')
    if given[0] == "path":
        file = folder / source
        if not file.is_file():
            raise UsageError(f"{where}: there is no document {file}")
        return Document.from_file(file, questions, id=name or source)
    if given[0] == "uri":
        return Document.from_uri(source, questions, id=name)
    return Document.from_text(source, questions, id=name)


def facts(job: Job) -> dict[str, Any]:
    """A job as JSON."""
    return {
        "id": job.id,
        "state": job.state,
        "model": job.model,
        "documents": job.documents,
        "questions": job.questions,
        "succeeded": job.succeeded,
        "failed": job.failed,
        "tokens_read": job.tokens_read,
        "prompt_tokens": job.usage.prompt_tokens,
        "cached_tokens": job.usage.cached_tokens,
        "completion_tokens": job.usage.completion_tokens,
        "eta_s": job.eta_s,
        "cost": job.cost,
        "created_at": job.created_at.isoformat(),
        "metadata": dict(job.metadata),
    }


@contextmanager
def _client(server: str, api_key: str | None, ca: Path | None, tls: bool) -> Iterator[BatchClient]:
    from penstock.client import BatchClient

    # Whoever typed it waits for a restart, not for a server that never comes.
    with BatchClient(server, api_key=api_key, ca=ca, tls=tls, retry_s=30.0) as client:
        yield client


@contextmanager
def _output(path: Path | None) -> Iterator[TextIO]:
    if path is None:
        yield sys.stdout
        return
    try:
        with path.open("w") as file:
            yield file
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error


def _write(out: TextIO, result: Result) -> None:
    out.write(orjson.dumps(result.facts()).decode() + "\n")
    out.flush()


def _follow(client: BatchClient, job_id: str, *, cursor: int, out: TextIO | None) -> int:
    """Bars on stderr, results to `out`. 0: all answered."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    from penstock.client import Result

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} questions"),
        TextColumn("{task.fields[more]}"),
    )
    last: Job | None = None
    with Progress(*columns, console=Console(stderr=True), transient=False) as bars:
        bar = bars.add_task(job_id, total=None, more="")
        for event in client.watch(job_id, cursor=cursor, results=out is not None):
            if isinstance(event, Result):
                assert out is not None
                _write(out, event)
                continue
            last = event
            bars.update(bar, total=event.questions, completed=event.answered, more=_more(event))
    if last is None:
        raise PenstockError(f"the job {job_id} ended without a word")
    if last.state == "completed" and not last.failed:
        return 0
    hint = f"; `penstock batch resume {job_id}` goes on" if last.state == "cancelled" else ""
    failed = f", {last.failed} questions failed" if last.failed else ""
    typer.echo(f"penstock: the job is {last.state}{failed}{hint}", err=True)
    return 1


def _more(job: Job) -> str:
    parts = [f"{job.tokens_read:,} tokens read", f"{job.cached_share:.0%} cached"]
    if job.eta_s:
        parts.append(f"{job.eta_s:.0f} s left")
    if job.failed:
        parts.append(f"{job.failed} failed")
    if job.cost is not None:
        parts.append(f"cost {job.cost:.4f}")
    return ", ".join(parts)


def _line(job: Job) -> str:
    made = job.created_at.astimezone().strftime("%Y-%m-%d %H:%M:%S")
    counts = f"{job.answered}/{job.questions} answered"
    failed = f", {job.failed} failed" if job.failed else ""
    return f"{job.id}  {job.state:<9}  {made}  {job.documents} documents, {counts}{failed}"
