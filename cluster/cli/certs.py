"""`penstock certs new|renew|show`: the certificates of a cluster and its token."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

Folder = Annotated[Path, typer.Option("--dir", metavar="DIR", help="The folder of the files.")]
Hosts = Annotated[
    list[str] | None,
    typer.Option("--host", help="A name or address that clients type; several times for several."),
]
Days = Annotated[int, typer.Option("--days", min=1, max=3650, help="How long certificates last.")]


def register(app: typer.Typer) -> None:
    group = typer.Typer(
        help="Certificates and token of a cluster (tls.*, front.tls_*).",
        no_args_is_help=True,
        rich_markup_mode=None,
    )
    group.command("new", help="Make an authority, a member's and a front's pair, a token.")(new)
    group.command("renew", help="New pairs of the same authority; restart to use them.")(renew)
    group.command("show", help="What is there and until when; exit code 1 if one has ended.")(show)
    app.add_typer(group, name="certs")


def new(
    folder: Folder = Path("certs"),
    host: Hosts = None,
    days: Days = 365,
    authority_days: Annotated[
        int, typer.Option(min=1, max=36500, help="How long the authority lasts.")
    ] = 3650,
) -> int:
    from cluster.tls.files import make, settings

    hosts = tuple(host or ("localhost", "127.0.0.1", "::1"))
    make(folder, hosts, days=days, authority_days=authority_days)
    typer.echo(settings(folder), nl=False)
    typer.echo(
        f"{folder} holds the files; the lines above belong into the file of `--config`. Keep "
        f"{folder / 'ca.key'} off the machines that serve: only `penstock certs renew` needs it",
        err=True,
    )
    return 0


def renew(folder: Folder = Path("certs"), host: Hosts = None, days: Days = 365) -> int:
    from cluster.tls.files import renew as renew_files

    renew_files(folder, tuple(host or ()), days=days)
    typer.echo(f"{folder} has new certificates; processes read them when they start")
    return 0


def show(
    folder: Folder = Path("certs"),
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> int:
    from cluster.tls.files import known

    now = datetime.now(UTC)
    found = known(folder)
    rows = [
        {
            "file": str(each.file),
            "subject": each.about.subject,
            "hosts": list(each.about.hosts),
            "until": each.about.until.isoformat(),
            "days_left": each.days_left(now),
            "authority": each.about.is_authority,
        }
        for each in found
    ]
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
    else:
        for row, each in zip(rows, found, strict=True):
            state = "expired" if each.days_left(now) < 0 else f"{each.days_left(now)} days left"
            names = " ".join(each.about.hosts) or "authority"
            typer.echo(f"{row['file']}  {state}  until {each.about.until:%Y-%m-%d}  {names}")
    return 1 if any(each.days_left(now) < 0 for each in found) else 0
