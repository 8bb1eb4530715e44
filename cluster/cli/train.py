"""`penstock train`: what made `ledger`, or a model of another configuration."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    app.command("train", help="Train a model; docs/training.md.")(train)


def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="See training/configs.")],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Checkpoints, curve, the model.")],
    resume: Annotated[
        str | None,
        typer.Option(metavar="latest|FILE", help="Go on where a checkpoint was taken."),
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="An exported model to begin with.")
    ] = None,
    stage: Annotated[
        str | None, typer.Option(help="The stage to begin with; needs --weights.")
    ] = None,
    eager: Annotated[bool, typer.Option("--eager", help="Do not compile (no C compiler).")] = False,
    lengths: Annotated[
        str, typer.Option(metavar="LIST", help="Tokens of the documents of the last evaluation.")
    ] = "512,4k,32k",
    questions: Annotated[
        int, typer.Option(min=0, help="Of each length of the last evaluation; 0: none.")
    ] = 300,
) -> int:
    from cluster.cli.evaluate import read_lengths

    sizes = read_lengths(lengths) if questions else ()
    # By name: this command tree must not reach torch before a command needs it (import-linter).
    importlib.import_module("training.__main__").run(
        config, out, resume=resume, weights=weights, stage=stage, eager=eager, lengths=sizes,
        questions=questions,
    )  # fmt: skip
    return 0
