"""The command line, command by command."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import typer

from cluster.cli.main import build
from cluster.reference.docstrings import cell

_HEAD = """# Command line

Made from the code. `penstock COMMAND --help` says the same. Exit codes: 0 done, 1 failed, 2 wrong
usage. An error is one sentence with its cause and what to type next; `--debug` shows the traceback.
"""


def commands() -> Iterator[tuple[str, Any]]:
    """Every command by its full name, groups included, in the order of `--help`."""

    def walk(path: str, command: Any) -> Iterator[tuple[str, Any]]:
        yield path, command
        for name, sub in getattr(command, "commands", {}).items():
            yield from walk(f"{path} {name}", sub)

    yield from walk("penstock", typer.main.get_command(build()))


def page() -> str:
    lines = [_HEAD]
    for path, command in commands():
        if path == "penstock" or getattr(command, "commands", None):
            continue
        lines += [f"## `{path}`", "", *_command(path, command)]
    return "\n".join(lines)


def _command(path: str, command: Any) -> list[str]:
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option"]
    usage = " ".join([path, *(_metavar(p) for p in arguments), *(["[OPTIONS]"] if options else [])])
    lines = [" ".join((command.help or "").split()), "", f"    {usage}", ""]
    if options:
        lines += ["| option | default | meaning |", "|---|---|---|"]
        for option in options:
            names = ", ".join(f"`{name}`" for name in [*option.opts, *option.secondary_opts])
            lines.append(f"| {names} | {_default(option)} | {cell(option.help or '')} |")
        lines.append("")
    return lines


def _metavar(parameter: Any) -> str:
    name = str(parameter.metavar or parameter.name).upper()
    name += "..." if parameter.nargs != 1 else ""
    return name if parameter.required else f"[{name}]"


def _default(option: Any) -> str:
    value = option.default
    if option.required:
        return "required"
    if value is None or value is False or value == () or callable(value) or repr(value) == "Unset":
        return ""
    shown = str(value)
    return "" if "UNSET" in shown.upper() else f"`{cell(shown)}`"
