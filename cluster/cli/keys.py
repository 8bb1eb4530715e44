"""`penstock keys new|list|revoke`: the file of API keys."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from penstock.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cluster.auth.keys import NewKey

KeysFile = Annotated[
    Path, typer.Option("--file", metavar="FILE", help="The key file (.json, else YAML).")
]
AsJson = Annotated[bool, typer.Option("--json", help="As JSON.")]
_SPAN = re.compile(r"(\d{1,6})([dhm])")
_UNITS = {"d": "days", "h": "hours", "m": "minutes"}


def register(app: typer.Typer) -> None:
    group = typer.Typer(
        help="API keys of a server (--api-keys-file).", no_args_is_help=True, rich_markup_mode=None
    )
    group.command("new", help="Make a key, print it once, keep its hash.")(new)
    group.command("list", help="The keys of a file; no secrets.")(show)
    group.command("revoke", help="Refuse a key from now on; running servers follow in 1 s.")(revoke)
    app.add_typer(group, name="keys")


def new(
    file: KeysFile,
    tenant: Annotated[
        str, typer.Option(help="Whose cache, files and jobs it sees; lower case, digits, .-_")
    ],
    name: Annotated[str, typer.Option(help="What it is for.")] = "",
    scope: Annotated[
        list[str] | None,
        typer.Option(help="generate, batch or read; several times for several; default: all."),
    ] = None,
    expires: Annotated[
        str | None,
        typer.Option(metavar="WHEN", help="90d, 12h, 30m from now, or a date as 2027-01-31."),
    ] = None,
    requests_per_minute: Annotated[int | None, typer.Option(help="In each front process.")] = None,
    tokens_per_minute: Annotated[
        int | None, typer.Option(help="Tokens that cost work: uncached prompt and answer.")
    ] = None,
    tokens_per_day: Annotated[int | None, typer.Option(help="As --tokens-per-minute.")] = None,
    concurrent_requests: Annotated[int | None, typer.Option(help="Most requests at once.")] = None,
    max_prompt_tokens: Annotated[int | None, typer.Option(help="Longest prompt.")] = None,
    as_json: AsJson = False,
) -> int:
    from cluster.auth.key_file import add_key
    from cluster.auth.keys import KeyLimits, new_key
    from penstock.settings import validated

    values = {
        "requests_per_minute": requests_per_minute,
        "tokens_per_minute": tokens_per_minute,
        "tokens_per_day": tokens_per_day,
        "concurrent_requests": concurrent_requests,
        "max_prompt_tokens": max_prompt_tokens,
    }
    limits = validated(KeyLimits, values, dict.fromkeys(values, "command line"))
    ends = _when(expires)

    def make(taken: Sequence[str]) -> NewKey:
        scopes = tuple(scope) if scope else ("generate", "batch", "read")
        return new_key(
            tenant=tenant, name=name, scopes=scopes, expires=ends, limits=limits, taken=taken
        )

    fresh = add_key(file, make)
    if as_json:
        shown = fresh.record.model_dump(mode="json", exclude={"sha256"}, exclude_none=True)
        typer.echo(json.dumps({"key": fresh.text, **shown}, indent=1))
        return 0
    # The key alone on stdout, so that a script can take it; the words for people on stderr.
    typer.echo(fresh.text)
    typer.echo(
        f"key {fresh.record.id} of tenant {tenant} is in {file}; it is shown only now. "
        f"Serve with `--api-keys-file {file}`",
        err=True,
    )
    return 0


def show(file: KeysFile, as_json: AsJson = False) -> int:
    from cluster.auth.keys import read_keys

    now = datetime.now(UTC)
    rows = []
    for key in read_keys(file).keys:
        row = key.model_dump(mode="json", exclude={"sha256", "revoked"}, exclude_none=True)
        rows.append({**row, "state": key.state(now)})
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
        return 0
    for row in rows:
        limits = " ".join(f"{name}={value}" for name, value in row["limits"].items())
        ends = f" until {row['expires']}" if "expires" in row else ""
        words = (row["id"], row["state"] + ends, row["tenant"], ",".join(row["scopes"]))
        typer.echo("  ".join((*words, row["name"] or "-", limits or "no limits")))
    return 0


def revoke(file: KeysFile, key_id: Annotated[str, typer.Argument(metavar="ID")]) -> int:
    from cluster.auth.key_file import revoke_key
    from cluster.auth.keys import id_of

    # Who pastes the whole key means its id.
    record = revoke_key(file, id_of(key_id) or key_id)
    typer.echo(f"key {record.id} of tenant {record.tenant} is revoked")
    return 0


def _when(text: str | None) -> datetime | None:
    if text is None:
        return None
    now = datetime.now(UTC).replace(microsecond=0)
    match = _SPAN.fullmatch(text.strip())
    try:
        if match:
            when = now + timedelta(**{_UNITS[match.group(2)]: int(match.group(1))})
        else:
            given = datetime.fromisoformat(text.strip())
            when = given if given.tzinfo else given.replace(tzinfo=UTC)
    except (ValueError, OverflowError):
        raise UsageError(
            f"--expires {text[:40]!a} is no time; write 90d, 12h or a date as 2027-01-31"
        ) from None
    if when <= now:
        raise UsageError(f"--expires {text[:40]!a} is in the past; the key would never work")
    return when
