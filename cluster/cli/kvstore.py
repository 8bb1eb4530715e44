"""`penstock kvstore`: one store node in the foreground, for a cluster that finds it by address."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from cluster.cli.options import ConfigFile


def register(app: typer.Typer) -> None:
    app.command("kvstore", help="Run one store node until Ctrl-C or SIGTERM.")(kvstore)


def kvstore(
    listen: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Address; port 0 takes a free one.")
    ] = None,
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory tier, such as 4GiB.")
    ] = None,
    disk: Annotated[
        str | None, typer.Option(metavar="DIR", help="Folder of the disk tier; with --disk-size.")
    ] = None,
    disk_size: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Disk tier, such as 100GiB.")
    ] = None,
    redis_url: Annotated[str | None, typer.Option(help="Redis as the index.")] = None,
    node_id: Annotated[
        str | None, typer.Option(help="Name in the index; a random one unless given.")
    ] = None,
    config: ConfigFile = None,
) -> int:
    from cluster.config import resolve
    from penstock.errors import UsageError

    settings = resolve(
        {
            "kvstore.listen": listen,
            "kvstore.memory_bytes": memory,
            "kvstore.disk_dir": disk,
            "kvstore.disk_bytes": disk_size,
            "kvstore.redis_url": redis_url,
            "kvstore.node_id": node_id,
        },
        file=config,
    )
    cluster = settings.config
    if disk is not None and not cluster.kvstore.disk_bytes:
        raise UsageError("--disk needs the size of the disk tier: add --disk-size 100GiB")
    cluster.tls.check()
    from kvstore.config import StoreSpec

    spec = StoreSpec(**cluster.kvstore.model_dump(), peers=cluster.tls, telemetry=cluster.telemetry)
    return become(spec.model_dump_json())


def become(first_line: str) -> int:
    """Turns this process into the store's own program, told `first_line` (secrets among it) by its
    standard input, so that no argument shows it.
    """
    reading, writing = os.pipe()
    # Settings are far smaller than a pipe's buffer: this write never blocks.
    os.write(writing, first_line.encode() + b"\n")
    os.close(writing)
    os.dup2(reading, 0)
    os.close(reading)
    os.execv(sys.executable, [sys.executable, "-P", "-m", "kvstore", "--config-stdin"])
