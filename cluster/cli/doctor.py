"""`penstock doctor`: what may keep a cluster from working here, each with its fix.

Exit codes: 0 nothing in the way (notes may be there), 1 something is, 2 wrong usage.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.cli.options import ConfigFile, DeviceOption, Launcher

if TYPE_CHECKING:
    from cluster.config import ClusterConfig
    from cluster.doctor.finding import Finding


def register(app: typer.Typer) -> None:
    app.command("doctor", help="Check this machine; every finding names its fix.")(doctor)


def doctor(
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="As for `serve`, like the options."),
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="HTTP port.")] = None,
    grpc_port: Annotated[int | None, typer.Option(help="Port of the gRPC batch service.")] = None,
    redis_url: Annotated[str | None, typer.Option(help="Redis as the index.")] = None,
    journal_url: Annotated[str | None, typer.Option(help="Durable Redis for jobs.")] = None,
    device: DeviceOption = None,
    launcher: Launcher = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Allow --host without a key and TLS.")
    ] = False,
    config: ConfigFile = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> int:
    from cluster.cli.serve import text
    from cluster.config import resolve

    resolved = resolve(
        {
            "model.model": model,
            "front.host": host,
            "front.port": port,
            "front.insecure": insecure or None,
            "batch.grpc_port": grpc_port,
            "batch.journal_url": journal_url,
            "kvstore.redis_url": redis_url,
            "model.device": text(device),
            "launcher.kind": text(launcher),
        },
        file=config,
    ).config
    found = []
    for finding in findings(resolved):
        found.append(finding)
        if not as_json:
            typer.echo(finding.line)
    failed = sum(finding.state == "fail" for finding in found)
    if as_json:
        rows = [finding.as_json() for finding in found]
        typer.echo(json.dumps({"ok": not failed, "findings": rows}, indent=1))
    elif failed:
        typer.echo(
            f"{failed} of {len(found)} checks failed; what to do stands behind each", err=True
        )
    return 1 if failed else 0


def findings(config: ClusterConfig) -> Iterator[Finding]:
    """All checks in order. One that breaks is a finding itself: the others still run."""
    from cluster.doctor.finding import Finding
    from cluster.doctor.machine import machine
    from cluster.doctor.model import model
    from cluster.doctor.packages import packages
    from cluster.doctor.services import services

    parts: tuple[tuple[str, Callable[[], Iterator[Finding]]], ...] = (
        ("machine", lambda: machine(config)),
        ("packages", packages),
        ("model", lambda: model(config.model.model)),
        ("services", lambda: services(config)),
    )
    for name, part in parts:
        try:
            yield from part()
        except Exception as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            yield Finding(
                name,
                f"the checks of '{name}' broke: {reason}",
                "report it with the output of `penstock --version`",
                fatal=False,
            )
