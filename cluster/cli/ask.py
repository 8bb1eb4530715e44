"""`penstock ask`: questions about a document, over HTTP like any other client."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster.cli.options import DeviceOption, Launcher
from cluster.cli.serve import text
from penstock.errors import InvalidRequestError, PenstockError, UnavailableError, UsageError

if TYPE_CHECKING:
    import httpx

_DEFAULT_URL = "http://127.0.0.1:8000"
_QUESTION = "Question: "


def register(app: typer.Typer) -> None:
    app.command("ask", help="Ask questions about a document.")(ask)


def ask(
    document: Annotated[Path, typer.Option(metavar="FILE", help="The document, UTF-8 text.")],
    question: Annotated[list[str], typer.Option(metavar="TEXT", help="May be given repeatedly.")],
    more: Annotated[
        list[str] | None, typer.Argument(metavar="[TEXT]...", help="Further questions.")
    ] = None,
    url: Annotated[
        str | None, typer.Option(help=f"A running server; {_DEFAULT_URL} unless given.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Start a cluster with this model for the questions.")
    ] = None,
    evidence: Annotated[
        bool, typer.Option("--evidence", help="Show what the answer was read from.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Answers as JSON.")] = False,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 128,
    api_key: Annotated[
        str | None, typer.Option(envvar="PENSTOCK_API_KEY", help="Key of the server.")
    ] = None,
    device: DeviceOption = None,
    launcher: Launcher = None,
) -> int:
    if url is not None and model is not None:
        raise UsageError("--url and --model exclude each other: ask a server or start one")
    try:
        content = document.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(
            f"cannot read the document {document}: {error.strerror}; check the path after "
            "--document"
        ) from error
    except UnicodeDecodeError as error:
        raise UsageError(
            f"the document {document} is not UTF-8 text; convert it (`iconv -t utf-8`) first"
        ) from error
    import httpx

    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    with _server(url, model, device, launcher) as base:
        timeout = httpx.Timeout(60.0, connect=10.0)
        with httpx.Client(base_url=base, headers=headers, timeout=timeout) as client:
            answers = []
            name = _served_name(client)
            for each in [*question, *(more or [])]:
                asked = each if each.startswith(_QUESTION) else _QUESTION + each
                body = {
                    "model": name,
                    "messages": [{"role": "user", "content": f"{content}\n\n{asked}"}],
                    "temperature": 0,
                    "max_tokens": max_tokens,
                    "evidence": evidence,
                    "stream": True,
                    "stream_options": {"include_usage": True},
                }
                answers.append({"question": each, **_one(client, body)})
                if not as_json:
                    _print(answers[-1], evidence=evidence)
    if as_json:
        typer.echo(json.dumps(answers, indent=1))
    return 0


@contextlib.contextmanager
def _server(url: str | None, model: str | None, device: Any, launcher: Any) -> Iterator[str]:
    if model is None:
        yield (url or _DEFAULT_URL).rstrip("/").removesuffix("/v1")
        return
    from cluster.config import resolve
    from cluster.launch import started
    from cluster.launchers.common import free_port

    flags = {
        "model.model": model,
        "front.port": free_port(),
        "model.device": text(device),
        "launcher.kind": text(launcher),
    }
    with started(resolve(flags).config) as endpoint:
        yield endpoint.url


def _served_name(client: httpx.Client) -> str:
    import httpx

    try:
        answer = client.get("/v1/models")
        answer.read()
    except (httpx.TransportError, httpx.InvalidURL) as error:
        raise UnavailableError(
            f"no server answers at {client.base_url}: {str(error).rstrip('.')}; start one with "
            "`penstock serve` or use --model"
        ) from error
    _check(answer)
    try:
        return str(answer.json()["data"][0]["id"])
    except (ValueError, LookupError, TypeError) as error:
        raise UnavailableError(
            f"what answers at {client.base_url} is no OpenAI-compatible server; check --url"
        ) from error


def _check(answer: httpx.Response) -> None:
    if answer.status_code == 200:
        return
    try:
        message = str(answer.json()["error"]["message"])
    except (ValueError, LookupError, TypeError):
        message = f"it answers with HTTP status {answer.status_code}"
    kind = InvalidRequestError if answer.status_code < 500 else UnavailableError
    raise kind(f"the server refused: {message}")


def _one(client: httpx.Client, body: dict[str, Any]) -> dict[str, Any]:
    """One streamed answer with its usage, times and evidence."""
    import httpx

    begun, first_s = time.monotonic(), 0.0
    answer = ""
    usage: dict[str, Any] = {}
    spans: list[dict[str, Any]] = []
    try:
        with client.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                response.read()
                _check(response)
            for line in response.iter_lines():
                if line.startswith(":"):
                    _progress(line[1:].strip())
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    raise PenstockError(f"the server failed: {event['error']['message']}")
                usage = event.get("usage") or usage
                for choice in event.get("choices", ()):
                    spans = choice["delta"].get("answer_evidence", spans)
                    if choice["delta"].get("content"):
                        first_s = first_s or time.monotonic() - begun
                        answer += choice["delta"]["content"]
    except httpx.TransportError as error:
        raise UnavailableError(f"the connection to {client.base_url} broke: {error}") from error
    finally:
        _progress("")
    return {
        "answer": answer,
        "usage": usage,
        "ttft_s": first_s,
        "total_s": time.monotonic() - begun,
        "evidence": spans,
    }


def _progress(line: str) -> None:
    if sys.stderr.isatty():
        typer.echo(f"\r\x1b[K{line}", nl=False, err=True)


def _print(answer: dict[str, Any], *, evidence: bool) -> None:
    usage = answer["usage"]
    cached = usage.get("prompt_tokens_details", {}).get("cached_tokens", 0)
    typer.echo(f"{answer['question']}\n  {answer['answer']}")
    typer.echo(
        f"  first token {answer['ttft_s']:.2f} s, {usage.get('prompt_tokens', 0)} prompt tokens, "
        f"{cached} cached"
    )
    if evidence:
        for span in answer["evidence"][:3]:
            shown = " ".join(str(span.get("text", "")).split())
            typer.echo(f"  [{span['start']}:{span['end']}] {span['weight']:.2f} {shown}")
