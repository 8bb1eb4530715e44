"""`penstock config show|schema`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from cluster.cli.options import ConfigFile


def register(app: typer.Typer) -> None:
    group = typer.Typer(help="Show the configuration.", no_args_is_help=True, rich_markup_mode=None)
    group.command("show", help="Every value with where it came from.")(show)
    group.command("schema", help="JSON schema of the configuration file.")(schema)
    app.add_typer(group, name="config")


def show(
    config: ConfigFile = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> int:
    from cluster.config import resolve

    settings = resolve(file=config).settings()
    if as_json:
        rows = [{"name": s.name, "value": s.shown, "origin": s.origin} for s in settings]
        typer.echo(json.dumps(rows, indent=1))
        return 0
    names = max(len(s.name) for s in settings)
    values = max(len(_shown(s.shown)) for s in settings)
    for s in settings:
        typer.echo(f"{s.name:<{names}}  {_shown(s.shown):<{values}}  {s.origin}")
    return 0


def _shown(value: object) -> str:
    return "-" if value is None or value == "" else str(value)


def schema() -> int:
    from cluster.config import schema as of_file

    typer.echo(json.dumps(of_file(), indent=1))
    return 0
