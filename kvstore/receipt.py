"""What a client does with bytes that have come: compare, decode, count."""

from __future__ import annotations

from kvstore.codec import decode_verified
from kvstore.contracts import Buffer, Missing, StoreObject
from kvstore.layout import largest_object_bytes
from penstock.blocks import CacheLayout
from penstock.errors import BlockIntegrityError
from penstock.telemetry import catalog as M
from penstock.telemetry.meters import Meter


class Receipts:
    """For one fingerprint and layout. Nothing that does not verify is handed out."""

    def __init__(self, *, fingerprint: bytes, layout: CacheLayout, meter: Meter) -> None:
        self.fingerprint = fingerprint
        self.layout = layout
        self.most_bytes = largest_object_bytes(layout)
        """No object of the layout has more."""
        self.failures = 0
        """Objects that were refused."""
        self._meter = meter

    def decoded(self, id_: bytes, raw: Buffer | None) -> StoreObject | Missing:
        """The object; Missing if `raw`, None for bytes without their digest, is not what `id_`
        promises.
        """
        try:
            if raw is None:
                raise BlockIntegrityError("an object's bytes do not match their BLAKE3 digest")
            return decode_verified(raw, id_=id_, fingerprint=self.fingerprint, layout=self.layout)
        except BlockIntegrityError:
            self.failures += 1
            self._meter.add(M.INTEGRITY_FAILURES)
            return Missing(id_, damaged=True)

    def transferred(self, direction: str, count: int, size_bytes: int, seconds: float) -> None:
        self._meter.add(M.TRANSFER_OBJECTS, count, direction=direction)
        self._meter.add(M.TRANSFER_BYTES, size_bytes, direction=direction)
        self._meter.observe(M.TRANSFER_TIME, seconds, direction=direction)

    def fell_back(self, reason: str) -> None:
        """A transfer goes on over gRPC."""
        self._meter.add(M.DATA_FALLBACKS, reason=reason)
