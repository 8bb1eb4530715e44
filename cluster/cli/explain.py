"""`penstock explain ROUTE`: why a request went where it went."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from penstock.errors import UnavailableError, UsageError

if TYPE_CHECKING:
    from cluster.routing.told import Told

_ID = re.compile(r"[A-Za-z0-9._-]{1,200}")
_LARGEST_BYTES = 64 << 20
_TIMEOUT_S = 10.0
_LEAST_WIDTH = 140


def register(app: typer.Typer) -> None:
    app.command("explain", help="Print the table of costs by which a request was routed.")(explain)


def explain(
    route: Annotated[
        str,
        typer.Argument(
            metavar="ROUTE",
            help="The `id` of an answer (chatcmpl-...), or a file that --json has written.",
        ),
    ],
    url: Annotated[str, typer.Option(help="The server that answered.")] = "http://127.0.0.1:8000",
    api_key: Annotated[
        str | None, typer.Option(envvar="PENSTOCK_API_KEY", help="Key of the server.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> int:
    from cluster.routing.told import Told

    path = Path(route)
    if path.is_file():
        told = Told.from_json(_read(path), str(path))
    elif _ID.fullmatch(route) is None or path.suffix == ".json":
        raise UsageError(f"'{route}' is neither a file nor the id of an answer")
    else:
        told = Told.from_json(_ask(url, route, api_key), url)
    if as_json:
        typer.echo(json.dumps(told.to_json(), indent=1))
    else:
        _show(told)
    return 0


def _read(path: Path) -> Any:
    try:
        if path.stat().st_size > _LARGEST_BYTES:
            raise UsageError(f"{path} is larger than any route")
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read as JSON: {error}") from error


def _ask(url: str, request_id: str, key: str | None) -> Any:
    import httpx

    headers = {"authorization": f"Bearer {key}"} if key else {}
    try:
        answer = httpx.get(
            f"{url.rstrip('/')}/cluster/routes/{request_id}", headers=headers, timeout=_TIMEOUT_S
        )
        content = answer.json()
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        raise UnavailableError(
            f"{url} does not answer as a Penstock server ({type(error).__name__}); is it running?"
        ) from error
    if answer.status_code != 200:
        message = content.get("error", {}).get("message") if isinstance(content, dict) else None
        raise UnavailableError(message or f"{url} answered with status {answer.status_code}")
    return content


def _show(told: Told) -> None:
    from rich.console import Console
    from rich.table import Table

    # A cut figure is none: a narrow terminal wraps the lines instead.
    console = Console(width=max(Console().width, _LEAST_WIDTH))
    facts = told.facts
    age = facts.get("mirror_age_s", -1)
    console.print(
        f"{told.request_id}: {facts['prompt_tokens']:,.0f} prompt tokens, of which "
        f"{facts['resumable_tokens']:,.0f} can be resumed "
        f"({'as far as this front has seen' if age < 0 else f'picture {age:.1f} s old'}), "
        f"up to {facts['max_tokens']:,.0f} to draw",
        highlight=False,
    )
    console.print(f"policy {told.policy}: {told.prefill} and {told.decode}", highlight=False)
    for role in ("prefill", "decode"):
        rows = [row for row in told.rows if row.role == role]
        rows.sort(key=lambda row: (bool(row.barred), row.total, row.worker_id))
        parts = list(dict.fromkeys(name for row in rows for name in row.parts))
        more = list(dict.fromkeys(name for row in rows for name in row.facts))
        table = Table(title=f"{role}, {told.unit}", title_justify="left", box=None)
        table.add_column("  worker", no_wrap=True)
        for name in ("total", *parts, *more):
            table.add_column(name.replace("_", " "), justify="right", no_wrap=True)
        for row in rows:
            mark = "* " if row.worker_id in (told.prefill, told.decode) else "  "
            cells = [_number(row.parts.get(name)) for name in parts]
            cells += [_number(row.facts.get(name)) for name in more]
            total = row.barred if row.barred else _number(row.total)
            table.add_row(mark + row.worker_id, total, *cells)
        console.print(table)


def _number(value: float | None) -> str:
    if value is None:
        return ""
    if value == float("inf"):
        return "never"
    return f"{value:,.0f}" if value == int(value) and abs(value) >= 1 else f"{value:.4g}"
