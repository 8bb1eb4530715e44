"""`penstock demo`: questions about a fresh long document, every answer checked."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cluster.cli.options import ConfigFile, DeviceOption, Launcher
from cluster.cli.serve import text


def register(app: typer.Typer) -> None:
    app.command("demo", help="Ask a fresh long document and check every answer.")(demo)


def demo(
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the report there.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the document; fresh unless given.")] = None,
    questions: Annotated[int, typer.Option(min=1, help="How many questions.")] = 8,
    unanswerable: Annotated[
        int | None, typer.Option(min=0, help="How many of them the document cannot answer.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=256, help="Least length of the document.")] = 32_768,
    model: Annotated[str | None, typer.Option(help="A model folder, `ledger` or `fake`.")] = None,
    device: DeviceOption = None,
    launcher: Launcher = None,
    port: Annotated[int | None, typer.Option(help="HTTP port; a free one unless given.")] = None,
    config: ConfigFile = None,
) -> int:
    from cluster.config import resolve
    from cluster.demo import run
    from cluster.launchers.common import free_port

    resolved = resolve(
        {
            "model.model": model,
            "model.device": text(device),
            "launcher.kind": text(launcher),
            # So that it runs beside a cluster that is up already.
            "front.port": free_port() if port is None else port,
        },
        file=config,
    )
    absent = min(2, questions // 4) if unanswerable is None else min(unanswerable, questions)
    return run(
        resolved.config,
        seed=seed,
        questions=questions,
        unanswerable=absent,
        tokens=tokens,
        json_path=json_file,
    )
