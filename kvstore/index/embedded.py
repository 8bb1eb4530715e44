"""The index inside the store node: a dictionary. The default on one machine; it is never lost."""

from __future__ import annotations

from collections.abc import Sequence

from kvstore.contracts import Location


class EmbeddedIndex:
    """`Index` in this process's memory. As large as the objects announced to it."""

    def __init__(self) -> None:
        self._locations: dict[bytes, Location] = {}
        self._nodes: dict[str, tuple[str, int]] = {}

    @property
    def backend(self) -> str:
        return "embedded"

    async def add(self, entries: Sequence[tuple[bytes, Location]]) -> None:
        for id_, location in entries:
            held = self._locations.get(id_)
            if held is None or held.node_id != location.node_id or held.epoch <= location.epoch:
                self._locations[id_] = location

    async def remove(self, ids: Sequence[bytes], *, node_id: str, epoch: int) -> None:
        for id_ in ids:
            location = self._locations.get(id_)
            if location is None or location.node_id != node_id:
                continue
            if location.epoch <= epoch:
                del self._locations[id_]

    async def lookup(self, ids: Sequence[bytes]) -> list[Location | None]:
        return [self._locations.get(id_) for id_ in ids]

    async def heartbeat(self, node_id: str, address: str, epoch: int) -> bool:
        known = self._nodes.get(node_id) == (address, epoch)
        self._nodes[node_id] = (address, epoch)
        return known

    async def nodes(self) -> dict[str, tuple[str, int]]:
        return dict(self._nodes)

    async def close(self) -> None:
        self._locations.clear()
        self._nodes.clear()
