"""`penstock run-batch`: OpenAI requests from a file through a cluster of its own."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import orjson
import typer

from cluster.cli.options import ConfigFile, DeviceOption, Launcher, NumericsOption
from penstock.errors import PenstockError, UsageError

if TYPE_CHECKING:
    import httpx

_TIMEOUT_S = 600.0
_POLL_S = 0.25


def register(app: typer.Typer) -> None:
    app.command("run-batch", help="Answer a file of OpenAI requests; needs no server.")(run_batch)


def run_batch(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A model folder, `ledger` or `fake`.")
    ],
    input_file: Annotated[
        Path, typer.Option("--input-file", "-i", metavar="IN.jsonl", help="One request a line.")
    ],
    output_file: Annotated[
        Path, typer.Option("--output-file", "-o", metavar="OUT.jsonl", help="One answer a line.")
    ],
    config: ConfigFile = None,
    launcher: Launcher = None,
    numerics: NumericsOption = None,
    device: DeviceOption = None,
) -> int:
    """0: every request was answered with 200."""
    import httpx

    from cluster.config import resolve
    from cluster.launch import started
    from cluster.launchers.common import free_port

    parts = _by_endpoint(input_file)
    _require_writable(output_file)
    with tempfile.TemporaryDirectory(prefix="penstock-") as folder:
        resolved = resolve(
            {
                "model.model": model,
                "model.numerics": None if numerics is None else str(numerics),
                "model.device": None if device is None else str(device),
                # Subprocesses start in seconds, and this cluster serves one file.
                "launcher.kind": "local" if launcher is None else str(launcher),
                "front.port": free_port(),
                "batch.journal_url": f"sqlite:///{folder}/journal.db",
            },
            file=config,
        )
        with (
            started(resolved.config) as endpoint,
            httpx.Client(base_url=endpoint.url, timeout=_TIMEOUT_S) as client,
        ):
            answers: dict[str, dict[str, Any]] = {}
            for url, rows in parts.items():
                answers |= _run(client, url, rows, resolved.config.served_name)
    return _write(output_file, parts, answers)


def _by_endpoint(path: Path) -> dict[str, list[tuple[str, bytes]]]:
    """Lines (custom id and bytes) by the endpoint that they name. Raises UsageError."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    parts: dict[str, list[tuple[str, bytes]]] = {}
    seen: set[str] = set()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = orjson.loads(line)
            name, url = row["custom_id"], row["url"]
        except (orjson.JSONDecodeError, KeyError, TypeError) as error:
            raise UsageError(
                f"{path}, line {number} is no request with custom_id, method, url and body"
            ) from error
        if not isinstance(name, str) or not isinstance(url, str) or name in seen:
            raise UsageError(f"{path}, line {number} needs a custom_id of its own and a url")
        seen.add(name)
        parts.setdefault(url, []).append((name, line))
    if not parts:
        raise UsageError(f"{path} holds no request")
    return parts


def _require_writable(path: Path) -> None:
    """Before an hour of work, not after it."""
    try:
        path.open("ab").close()
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error


def _run(
    client: httpx.Client, url: str, rows: list[tuple[str, bytes]], model: str
) -> Mapping[str, dict[str, Any]]:
    from rich.console import Console
    from rich.progress import Progress

    content = b"".join(line + b"\n" for _, line in rows)
    file = _checked(
        client.post("/v1/files", data={"purpose": "batch"}, files={"file": ("in.jsonl", content)})
    )
    job = _checked(
        client.post(
            "/v1/batches",
            json={"input_file_id": file["id"], "endpoint": url, "completion_window": "24h"},
        )
    )
    with Progress(console=Console(stderr=True)) as bars:
        bar = bars.add_task(f"{model} {url}", total=len(rows))
        while job["status"] == "in_progress":
            time.sleep(_POLL_S)
            job = _checked(client.get(f"/v1/batches/{job['id']}"))
            counts = job["request_counts"]
            bars.update(bar, completed=counts["completed"] + counts["failed"])
    return {row["custom_id"]: row for row in _outputs(client, job)}


def _outputs(client: httpx.Client, job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for name in ("output_file_id", "error_file_id"):
        if job[name] is not None:
            answer = client.get(f"/v1/files/{job[name]}/content")
            answer.raise_for_status()
            for line in answer.content.splitlines():
                yield orjson.loads(line)


def _checked(answer: httpx.Response) -> dict[str, Any]:
    content: dict[str, Any] = answer.json()
    if answer.status_code != 200:
        message = content["error"]["message"]
        wrong = UsageError if answer.status_code == 400 else PenstockError
        raise wrong(message)
    return content


def _write(
    path: Path,
    parts: Mapping[str, list[tuple[str, bytes]]],
    answers: Mapping[str, dict[str, Any]],
) -> int:
    failed = 0
    with path.open("wb") as out:
        for rows in parts.values():
            for name, _ in rows:
                row = answers[name]
                response = row.get("response") or {}
                failed += response.get("status_code") != 200
                out.write(orjson.dumps(row) + b"\n")
    total = len(answers)
    typer.echo(f"{total - failed} of {total} requests answered; {path}")
    return 1 if failed else 0
