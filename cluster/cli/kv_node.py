"""`penstock kv stat|ls|verify|evict`: an operator's view of one store node."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from cluster.cli.options import ConfigFile
from penstock.errors import UsageError

if TYPE_CHECKING:
    from kvstore.admin_client import AdminClient

_DAMAGED = 1

Server = Annotated[
    str, typer.Option("--server", metavar="HOST:PORT", help="The store node's address.")
]
Json = Annotated[bool, typer.Option("--json", help="JSON in place of text.")]
Result = TypeVar("Result")


def register_node_commands(group: typer.Typer) -> None:
    group.command("stat", help="A node's figures.")(stat)
    group.command("ls", help="Objects of a node, in order of id.")(ls)
    group.command("verify", help="Read objects in every tier and compare their digests.")(verify)
    group.command("evict", help="Let go of objects that nobody leases or reads.")(evict)


def stat(server: Server, as_json: Json = False, config: ConfigFile = None) -> int:
    async def ask(client: AdminClient) -> dict[str, Any]:
        answer = await client.stat()
        return {field.name: getattr(answer, field.name) for field in answer.DESCRIPTOR.fields}

    figures = _with(server, config, ask)
    if as_json:
        typer.echo(json.dumps(figures, indent=1))
        return 0
    for name, value in figures.items():
        typer.echo(f"{name:24} {value}")
    return 0


def ls(
    server: Server,
    limit: Annotated[int, typer.Option(min=1, help="Most objects to show.")] = 1000,
    as_json: Json = False,
    config: ConfigFile = None,
) -> int:
    async def ask(client: AdminClient) -> list[dict[str, Any]]:
        return [
            {
                "id": info.id.hex(),
                "kind": "state" if info.kind == 2 else "block",
                "size_bytes": info.size_bytes,
                "position": info.position,
                "in_memory": info.in_memory,
                "on_disk": info.on_disk,
                "held": info.held,
            }
            async for info in client.objects(limit)
        ]

    rows = _with(server, config, ask)
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
        return 0
    for row in rows:
        tiers = "+".join(
            name for name, key in (("memory", "in_memory"), ("disk", "on_disk")) if row[key]
        )
        held = " held" if row["held"] else ""
        typer.echo(
            f"{row['id']} {row['kind']} {row['size_bytes']:>10} {row['position']:>9} {tiers}{held}"
        )
    return 0


def verify(
    server: Server,
    ids: Annotated[
        list[str] | None, typer.Argument(metavar="[ID]...", help="Object ids in hex; none: all.")
    ] = None,
    as_json: Json = False,
    config: ConfigFile = None,
) -> int:
    """Exit status 1 if something failed its digest."""
    chosen = _ids(ids)

    async def ask(client: AdminClient) -> dict[str, Any]:
        asked = chosen or [info.id async for info in client.objects()]
        answer = await client.verify(asked)
        return {
            "objects": len(asked),
            "copies": answer.checked,
            "bytes": answer.checked_bytes,
            "damaged": [id_.hex() for id_ in answer.damaged],
        }

    found = _with(server, config, ask)
    if as_json:
        typer.echo(json.dumps(found, indent=1))
    else:
        typer.echo(
            f"{found['copies']} copies of {found['objects']} objects read, {found['bytes']} bytes; "
            f"{len(found['damaged'])} failed their digest and are gone"
        )
        for id_ in found["damaged"]:
            typer.echo(id_)
    return _DAMAGED if found["damaged"] else 0


def evict(
    server: Server,
    ids: Annotated[
        list[str] | None, typer.Argument(metavar="[ID]...", help="Object ids in hex.")
    ] = None,
    size_bytes: Annotated[
        int, typer.Option("--bytes", min=0, help="Without ids: idle bytes of each tier to free.")
    ] = 0,
    tier: Annotated[str, typer.Option(help="memory, disk or all.")] = "memory",
    as_json: Json = False,
    config: ConfigFile = None,
) -> int:
    if tier not in ("memory", "disk", "all"):
        raise UsageError(f"--tier {tier[:40]!a} is unknown; there are memory, disk and all")
    chosen = _ids(ids)
    if bool(chosen) == bool(size_bytes):
        raise UsageError("say what to evict: ids, or --bytes N for what the policy chooses")

    async def ask(client: AdminClient) -> dict[str, int]:
        answer = await client.evict(
            chosen, size_bytes=size_bytes, memory=tier != "disk", disk=tier != "memory"
        )
        return {"evicted": answer.evicted, "bytes": answer.evicted_bytes}

    gone = _with(server, config, ask)
    text = f"{gone['evicted']} copies left, {gone['bytes']} bytes; what is held stays"
    typer.echo(json.dumps(gone) if as_json else text)
    return 0


def _with(
    server: str, config: Path | None, ask: Callable[[AdminClient], Awaitable[Result]]
) -> Result:
    """`ask`'s answer, over a channel with the settings' certificates and token."""
    from cluster.config import resolve
    from kvstore.admin_client import AdminClient

    peers = resolve({}, file=config).config.tls
    peers.check()

    async def run() -> Result:
        client = AdminClient(server, peers=peers)
        try:
            return await ask(client)
        finally:
            await client.close()

    return asyncio.run(run())


def _ids(texts: list[str] | None) -> list[bytes]:
    ids = []
    for text in texts or ():
        try:
            id_ = bytes.fromhex(text)
        except ValueError:
            id_ = b""
        if len(id_) != 32:
            raise UsageError(f"{text[:80]!a} is no object id: 64 hex digits, as `kv ls` shows them")
        ids.append(id_)
    return ids
