"""`penstock kv trace`: what a store of some size and policy would have done with a trace.

The commands that ask a running node are in `kv_node.py`.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.cli.kv_node import register_node_commands
from penstock.errors import UsageError

if TYPE_CHECKING:
    from kvstore.policy.replay import ReplayResult

_BAR_CHARS = 32
# DeepSeek-V4-Flash, FP8 rows (tests/model/test_layout.py): 0.90 MB for a block of 256 tokens.
_FLASH_BYTES_PER_TOKEN = 3514.25


def register(app: typer.Typer) -> None:
    group = typer.Typer(
        help="The KV store: what a node holds, and what a store would do with a trace.",
        no_args_is_help=True,
        rich_markup_mode=None,
    )
    group.command("trace", help="Replay a trace of prompts and print hit rates.")(trace)
    register_node_commands(group)
    app.add_typer(group, name="kv")


def trace(
    replay_file: Annotated[
        Path,
        typer.Argument(
            metavar="REPLAY.jsonl",
            help="One request a line: input_length and hash_ids of 512 tokens each.",
        ),
    ],
    policy: Annotated[
        str, typer.Option(help="reuse, lru, s3-fifo (separated by commas), or all.")
    ] = "all",
    shares: Annotated[
        str, typer.Option(metavar="PERCENTS", help="Store sizes, in % of the unique bytes.")
    ] = "1,5,10,25",
    bytes_per_token: Annotated[
        float, typer.Option(help="KV bytes per token; the default is DeepSeek-V4-Flash's.")
    ] = _FLASH_BYTES_PER_TOKEN,
    as_json: Annotated[Path | None, typer.Option("--json", metavar="FILE")] = None,
) -> int:
    from kvstore.policy.choice import Eviction, open_policy
    from kvstore.policy.replay import read_trace, replay, unique_bytes

    names = [name.strip() for name in policy.split(",")] if policy != "all" else list(Eviction)
    unknown = [name for name in names if name not in set(Eviction)]
    if unknown:
        known = ", ".join(Eviction)
        raise UsageError(f"--policy {unknown[0][:40]!a} is unknown; there are {known} and all")
    percents = _percents(shares)
    requests = read_trace(replay_file)
    if not requests:
        raise UsageError(f"the trace {replay_file} has no requests")
    unique = unique_bytes(requests, bytes_per_token=bytes_per_token)

    def run(name: str, capacity: int) -> ReplayResult:
        return replay(
            requests,
            policy=open_policy(Eviction(name), capacity),
            capacity_bytes=capacity,
            bytes_per_token=bytes_per_token,
        )

    best = run(Eviction.LRU, unique)
    typer.echo(
        f"{best.requests} requests, {best.prompt_tokens} prompt tokens, "
        f"{unique / 1e9:.2f} GB of different blocks; a store that never evicts hits "
        f"{best.hit_rate:.4f}"
    )
    typer.echo(f"{'policy':8} {'store':>18}  {'hit rate':8} {'':{_BAR_CHARS}}  evictions  written")
    rows = [{"policy": "infinite", "percent": 100.0, "hit_rate": best.hit_rate, **asdict(best)}]
    for percent in percents:
        for name in names:
            result = run(name, max(1, int(unique * percent / 100)))
            typer.echo(_line(name, percent, result, best.hit_rate))
            rows.append(
                {"policy": name, "percent": percent, "hit_rate": result.hit_rate, **asdict(result)}
            )
    if as_json is not None:
        as_json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0


def _line(name: str, percent: float, result: ReplayResult, best: float) -> str:
    """One row; the bar is full where the store does as well as one that never evicts."""
    filled = round(_BAR_CHARS * result.hit_rate / best) if best else 0
    size = f"{percent:g} % {result.capacity_bytes / 1e9:.2f} GB"
    bar = "#" * min(filled, _BAR_CHARS)
    refused = f"  {result.refused} blocks had no room" if result.refused else ""
    return (
        f"{name:8} {size:>18}  {result.hit_rate:.4f}   {bar:.<{_BAR_CHARS}}  "
        f"{result.evictions:9}  {result.written_bytes / 1e9:.2f} GB{refused}"
    )


def _percents(text: str) -> list[float]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or not all(0 < value <= 100 for value in values):
        raise UsageError(f"--shares {text[:40]!a}: numbers above 0 and up to 100, as 1,5,10,25")
    return values
