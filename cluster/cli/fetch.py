"""`penstock fetch`: a model folder, brought to a place and checked."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    app.command("fetch", help="Fetch a model folder, or check one by its digest.")(fetch)


def fetch(
    destination: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where it shall be.")],
    source: Annotated[
        str | None,
        typer.Option("--from", metavar="SOURCE", help="hub:ORG/NAME, or a URL such as s3://..."),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Hub: a commit.")] = None,
    digest: Annotated[
        str | None, typer.Option(metavar="sha256:...", help="Refuse any other.")
    ] = None,
    without_weights: Annotated[
        bool, typer.Option("--without-weights", help="Only what a front reads.")
    ] = False,
) -> int:
    from cluster.fetch import fetch as bring
    from cluster.fetch import folder_digest

    found = bring(
        destination,
        source=source,
        revision=revision,
        digest=digest,
        weights=not without_weights,
        progress=_Meter(),
    )
    typer.echo(f"digest         {found}" if not without_weights else f"config digest  {found}")
    if not without_weights:
        typer.echo(f"config digest  {folder_digest(destination, weights=False)}")
    return 0


class _Meter:
    """One line on stderr every few seconds: how much, how fast."""

    def __init__(self) -> None:
        self._started = self._said = time.monotonic()
        self._bytes = 0

    def __call__(self, name: str, size_bytes: int) -> None:
        self._bytes += size_bytes
        now = time.monotonic()
        if now - self._said > 5.0:
            self._said = now
            rate = self._bytes / (now - self._started) / 1e6
            print(
                f"{name}: {self._bytes / 1e9:.2f} GB, {rate:.0f} MB/s", file=sys.stderr, flush=True
            )
