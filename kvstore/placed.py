"""Objects that a writer on the host writes into the memory of the node itself: its side."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from kvstore.arena import Arena
from kvstore.data.frames import What
from kvstore.data.link import Link, LinkError
from kvstore.data.work import settled
from kvstore.transfer import OpenPut
from protos.penstock.kv.v1 import kv_pb2

QUARANTINE_S = 60.0
"""Places that a writer did not come back from are nobody's for so long: it may still write."""


class PlacedWork:
    """Reserved objects whose places a writer was told. Belongs to the node's event loop."""

    what = What.PLACE

    def __init__(self, puts: Sequence[OpenPut], arena: Arena) -> None:
        self._puts = puts
        self._arena = arena

    def run(self, link: Link) -> None:
        raise LinkError("ticket", "a ticket for the node's memory came over a connection")

    async def settle(self, digests: Sequence[bytes]) -> kv_pb2.OfferResult:
        """Commits what was written, in order; no answers for another number of digests."""
        answer = kv_pb2.OfferResult()
        if len(digests) != len(self._puts):
            self.give_up()
            return answer
        try:
            for put, digest in zip(self._puts, digests, strict=True):
                await asyncio.to_thread(put.written)
                answer.answers.append(settled(put, digest))
        finally:
            for put in self._puts:
                put.abort()
        return answer

    def give_up(self) -> None:
        places = [put.data for put in self._puts]
        for put in self._puts:
            put.abort()
        for place in places:
            self._arena.empty(place)
        asyncio.get_running_loop().call_later(QUARANTINE_S, places.clear)
