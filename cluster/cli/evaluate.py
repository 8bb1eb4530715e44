"""`penstock eval`: whether a model finds what stands in a long document, and says when nothing
does.
"""

from __future__ import annotations

import importlib
import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from cluster.cli.options import ConfigFile, DeviceOption, KvCacheDtypeOption, Launcher
from cluster.cli.serve import text
from penstock.errors import UsageError

_LEAST, _MOST = 512, 1 << 20


class Suite(StrEnum):
    needle = "needle"
    multi_needle = "multi-needle"
    unanswerable = "unanswerable"
    evidence = "evidence"
    all = "all"


def register(app: typer.Typer) -> None:
    app.command("eval", help="Measure answers about long documents: exact match, evidence.")(
        evaluate
    )


def evaluate(
    suite: Annotated[Suite, typer.Argument(help="What is asked.")],
    model: Annotated[str, typer.Argument(help="A model folder or `ledger`.")] = "ledger",
    lengths: Annotated[
        str, typer.Option(metavar="LIST", help="Tokens of the documents: 1k,8k,64k.")
    ] = "1k,8k,32k",
    seed: Annotated[int, typer.Option(help="Of documents and questions.")] = 1,
    questions: Annotated[
        int, typer.Option(min=1, help="Least number behind each figure of each length.")
    ] = 110,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the report there.")
    ] = None,
    plot_file: Annotated[
        Path | None,
        typer.Option("--plot", metavar="FILE.png", help="Draw exact match by depth and length."),
    ] = None,
    url: Annotated[str | None, typer.Option(help="A running server; else one is started.")] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="PENSTOCK_API_KEY", help="Key of the server.")
    ] = None,
    gate: Annotated[
        bool, typer.Option("--gate/--no-gate", help="Ask everything with grounding strict, too.")
    ] = True,
    permuted_head: Annotated[
        bool,
        typer.Option("--permuted-head", help="Control: permute the head's rows; nothing is right."),
    ] = False,
    in_process: Annotated[
        bool,
        typer.Option(
            "--in-process",
            help="Without a cluster: dense, random and recent entries, and caches, side by side.",
        ),
    ] = False,
    launcher: Launcher = None,
    device: DeviceOption = None,
    kv_cache_dtype: KvCacheDtypeOption = None,
    config: ConfigFile = None,
) -> int:
    if url is not None and (launcher or device or kv_cache_dtype or config or permuted_head):
        raise UsageError(
            "--url asks a running server; leave --launcher, --device, --kv-cache-dtype, --config "
            "and --permuted-head out"
        )
    if in_process and (url is not None or permuted_head):
        raise UsageError("--in-process has no server; leave --url and --permuted-head out")
    sizes = read_lengths(lengths)
    report = importlib.import_module("bench.report")
    for path in (json_file, plot_file):
        report.check_writable(path)
    if in_process:
        inside = _room("inside")
        return int(inside.run(
            model, suite=suite.value, lengths=sizes, questions=questions, seed=seed,
            json_path=json_file, plot_path=plot_file,
        ))  # fmt: skip
    room = _room("run")
    plan = room.Plan(suite.value, sizes, questions, seed, gate, permuted_head)
    resolved = None if url is not None else _config(model, launcher, device, kv_cache_dtype, config)
    return int(room.run(
        plan, config=resolved, url=url, model=model, key=api_key, json_path=json_file,
        plot_path=plot_file,
    ))  # fmt: skip


def read_lengths(given: str) -> tuple[int, ...]:
    """`512,8k,1M` as tokens, ascending. Raises `UsageError`."""
    sizes = set()
    for part in given.split(","):
        found = re.fullmatch(r"\s*(\d+)([kM]?)\s*", part)
        if found is None:
            raise UsageError(
                f"--lengths is '{given}', and '{part}' is no length; write 1k,8k,64k or 1M"
            )
        sizes.add(int(found[1]) * {"": 1, "k": 1 << 10, "M": 1 << 20}[found[2]])
    if min(sizes) < _LEAST or max(sizes) > _MOST:
        raise UsageError(f"--lengths are from {_LEAST} to 1M tokens; '{given}' is not")
    return tuple(sorted(sizes))


def _config(model: str, launcher: Any, device: Any, kv_cache_dtype: Any, file: Path | None) -> Any:
    from cluster.config import resolve
    from cluster.launchers.common import free_port

    flags = {
        "model.model": model,
        "model.device": text(device),
        "model.kv_cache_dtype": text(kv_cache_dtype),
        "launcher.kind": text(launcher),
        "front.port": free_port(),
    }
    return resolve(flags, file=file).config


def _room(name: str) -> Any:
    """By name: benchmarks stand above the cluster, which must not import them (import-linter)."""
    return importlib.import_module(f"bench.quality.{name}")
