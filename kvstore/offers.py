"""Offer and Settle: room for objects whose bytes come beside gRPC."""

from __future__ import annotations

import os
from collections.abc import Sequence

from kvstore.data.frames import What
from kvstore.data.port import DataPort
from kvstore.data.tickets import Tickets
from kvstore.data.work import ReceiveWork
from kvstore.node import StoreNode
from kvstore.placed import PlacedWork
from kvstore.put_stream import begin
from kvstore.transfer import OpenPut
from penstock.errors import InvalidRequestError
from penstock.telemetry import trace
from protos.penstock.kv.v1 import kv_pb2

MOST_OFFERED = 64
"""Most objects of one Offer."""


class Offers:
    """Of one node. Belongs to its event loop."""

    def __init__(self, node: StoreNode, tickets: Tickets, port: DataPort | None) -> None:
        self._node = node
        self._tickets = tickets
        self._port = port

    def offer(self, request: kv_pb2.OfferRequest, *, is_near: bool) -> kv_pb2.OfferResponse:
        """`is_near`: the writer can open this process's memory."""
        for what in (request.objects, request.withdraw):
            if len(what) > MOST_OFFERED:
                raise InvalidRequestError(
                    f"{len(what)} objects or tickets in one offer; at most {MOST_OFFERED}"
                )
        trace.note(ids=len(request.objects))
        for ticket in request.withdraw:
            self._tickets.withdraw(ticket)
        answer = kv_pb2.OfferResponse(port=0 if self._port is None else self._port.port)
        if self._port is None and not is_near:
            return answer
        puts = self._begin(request, answer)
        if not puts:
            return answer
        if is_near and self._place(puts, answer):
            return answer
        if self._port is None:
            for put in puts:
                put.abort()
            return kv_pb2.OfferResponse()
        work = ReceiveWork(puts, idle_s=self._node.config.put_idle_s)
        answer.ticket = self._tickets.issue(work)
        return answer

    async def settle(self, request: kv_pb2.SettleRequest) -> kv_pb2.OfferResult:
        """Nothing for a ticket that is none, or no more."""
        work = self._tickets.take(request.ticket, What.PLACE)
        if not isinstance(work, PlacedWork):
            return kv_pb2.OfferResult()
        trace.note(ids=len(request.digests))
        return await work.settle(request.digests)

    def _begin(self, request: kv_pb2.OfferRequest, answer: kv_pb2.OfferResponse) -> list[OpenPut]:
        puts = []
        for asked in request.objects:
            put, one = begin(
                self._node,
                asked,
                owner=request.owner,
                ttl_ms=request.lease_ttl_ms,
                rolling=request.rolling,
            )
            answer.answers.append(one)
            if put is not None:
                puts.append(put)
            if one.status == kv_pb2.PutResponse.STATUS_REFUSED:
                break
        return puts

    def _place(self, puts: Sequence[OpenPut], answer: kv_pb2.OfferResponse) -> bool:
        """Whether all of them lie in shared memory; then `answer` says where."""
        places = [place for put in puts if (place := self._node.shared(put)) is not None]
        if len(places) < len(puts):
            return False
        arena = places[0][0]
        answer.places.pid, answer.places.fd = os.getpid(), arena.fd
        answer.places.secret = arena.secret
        answer.places.offsets.extend(offset for _, offset in places)
        answer.ticket = self._tickets.issue(PlacedWork(puts, arena))
        return True
