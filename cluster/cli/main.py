"""Entry point: runs a command, turns every error into one sentence and an exit code.

0 done, 1 failed, 2 wrong usage. `--debug` (anywhere before `--`) shows the traceback as well.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer

from cluster.cli import (
    ask,
    batch,
    bench,
    certs,
    config,
    demo,
    doctor,
    evaluate,
    explain,
    fetch,
    keys,
    kv,
    kvstore,
    logits,
    rollout,
    run_batch,
    serve,
    simulate,
    train,
)
from penstock.errors import PenstockError, UsageError

_DEBUG = "--debug"


def build() -> typer.Typer:
    """The whole command tree."""
    app = typer.Typer(
        name="penstock",
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    )
    app.callback(help="Serves DeepSeek-V4-class models with million-token context.")(_root)
    for group in (serve, kvstore, fetch, demo, ask, run_batch, logits, doctor, simulate, explain):
        group.register(app)
    batch.register(app)
    bench.register(app)
    config.register(app)
    evaluate.register(app)
    rollout.register(app)
    train.register(app)
    keys.register(app)
    certs.register(app)
    kv.register(app)
    return app


def _show_version(wanted: bool) -> None:
    if not wanted:
        return
    from importlib.metadata import PackageNotFoundError, version

    try:
        number = version("penstock")
    except PackageNotFoundError:
        number = "0+unknown"
    typer.echo(f"penstock {number}")
    raise typer.Exit()


def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_show_version, help="Print the version and exit."
        ),
    ] = False,
    debug: Annotated[bool, typer.Option(_DEBUG, help="Show tracebacks of errors.")] = False,
) -> None:
    """Both options act before any command: see `_show_version` and `main`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code of `penstock ARGV`."""
    args = list(sys.argv[1:] if argv is None else argv)
    debug = _DEBUG in args[: args.index("--")] if "--" in args else _DEBUG in args
    if debug:
        args.remove(_DEBUG)
    try:
        result = typer.main.get_command(build())(args, prog_name="penstock", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except Exception as error:
        if debug:
            traceback.print_exc()
        return _report(error)
    except KeyboardInterrupt:
        return _say("stopped by Ctrl-C", 1)


def _report(error: Exception) -> int:
    if isinstance(error, PenstockError):
        return _say(error.message, 2 if isinstance(error, UsageError) else 1)
    if isinstance(error, typer.Abort):
        return _say("stopped", 1)
    if isinstance(error, BrokenPipeError):
        # The reader of our output has gone; the interpreter must not try to flush it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    shown = getattr(error, "format_message", None)
    if shown is not None:  # A usage error of the command-line library.
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "penstock"
        if type(error).__name__ == "NoArgsIsHelpError":
            typer.echo(shown())
            return 2
        sentence = shown().rstrip(". ")
        return _say(f"{sentence}; see `{command} --help`", 2)
    kind = type(error).__name__
    reason = " ".join(str(error).split()) or "no reason given"
    return _say(f"unexpected {kind}: {reason}; run the command again with {_DEBUG}", 1)


def _say(sentence: str, code: int) -> int:
    typer.echo(f"penstock: {sentence}", err=True)
    return code
