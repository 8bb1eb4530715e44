"""Objects on their way in and out of a node: `OpenPut` and `OpenGet`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from blake3 import blake3

from kvstore.catalog import Reservation
from kvstore.codec import DIGEST_BYTES, object_kind, read_header
from kvstore.contracts import Buffer
from penstock.blocks import ObjectKind
from penstock.errors import BlockIntegrityError, InvalidRequestError
from protos.penstock.kv.v1 import kv_pb2


class Keeper(Protocol):
    """Who takes an object that was written whole: the node."""

    def keep(
        self, put: OpenPut, data: memoryview, digest: bytes, header: kv_pb2.ObjectHeader
    ) -> bool:
        """Make it visible; True if nobody was first."""

    def allocate(self, size_bytes: int) -> memoryview:
        """Memory to write an object to, by `fill` alone."""

    def fill(self, data: memoryview, start: int, chunk: Buffer) -> None:
        """`chunk` into such memory from `start` on."""

    def give_up(self, reservation: Reservation) -> None:
        """Give reserved bytes back. Idempotent, also after `keep`."""

    def refused(self) -> None:
        """Bytes were not what their digest or header says."""


class OpenPut:
    """One object being written. Ends by `commit` or `abort`; `abort` may always be called again."""

    def __init__(
        self,
        keeper: Keeper,
        reservation: Reservation,
        *,
        owner: str,
        ttl_s: float,
        rolling: bool,
    ) -> None:
        self.reservation = reservation
        self.owner = owner
        self.ttl_s = ttl_s
        self.rolling = rolling
        self._keeper = keeper
        self._data = keeper.allocate(reservation.size_bytes)
        self._filled = 0
        self._hasher = blake3()

    def write(self, chunk: Buffer) -> None:
        """Append bytes. Raises InvalidRequestError beyond the reserved size."""
        end = self._filled + len(chunk)
        if end > len(self._data):
            raise InvalidRequestError(f"more data than the {len(self._data)} bytes reserved")
        self._keeper.fill(self._data, self._filled, chunk)
        self._filled = end
        self._hasher.update(chunk)

    @property
    def room(self) -> memoryview:
        """Where the next bytes belong, for who receives them in place and then says `took`."""
        return self._data[self._filled :]

    def took(self, chunk: memoryview) -> None:
        """`chunk`, the start of `room`, has been received."""
        self._filled += len(chunk)
        self._hasher.update(chunk)

    @property
    def data(self) -> memoryview:
        """Where the object belongs."""
        return self._data

    def written(self) -> None:
        """All of it was written by others, into `data`. Reads it all: for a thread."""
        self._filled = len(self._data)
        self._hasher.update(self._data)

    @property
    def is_full(self) -> bool:
        """All reserved bytes have come."""
        return self._filled == len(self._data)

    def commit(self, digest: bytes) -> bool:
        """True if this made the object visible. The bytes are given back if it fails.

        Raises InvalidRequestError for a short object, BlockIntegrityError for wrong bytes.
        """
        try:
            if self._filled != len(self._data):
                raise InvalidRequestError(
                    f"commit after {self._filled} of {len(self._data)} reserved bytes"
                )
            if len(digest) != DIGEST_BYTES:
                raise InvalidRequestError(f"a digest has {DIGEST_BYTES} bytes, not {len(digest)}")
            header = self._check(digest)
            return self._keeper.keep(self, self._data, digest, header)
        finally:
            self.abort()

    def abort(self) -> None:
        self._keeper.give_up(self.reservation)

    def _check(self, digest: bytes) -> kv_pb2.ObjectHeader:
        try:
            if self._hasher.digest() != digest:
                raise BlockIntegrityError("the object's bytes do not match the digest of commit")
            header, _ = read_header(self._data)
            kind = object_kind(header.kind)
            if header.id != self.reservation.id or kind is not self.reservation.kind:
                raise BlockIntegrityError("the object's header does not match its reservation")
            return header
        except (BlockIntegrityError, InvalidRequestError):
            self._keeper.refused()
            raise


class OpenGet:
    """One object being read: its bytes stay until `close`, which may be called again."""

    def __init__(
        self, kind: ObjectKind, digest: bytes, data: memoryview, done: Callable[[int], None]
    ) -> None:
        """`done`: told once how many bytes were held for the reader."""
        self.kind = kind
        self.digest = digest
        self.data = data
        self._done: Callable[[int], None] | None = done

    def close(self) -> None:
        done, self._done = self._done, None
        if done is not None:
            done(len(self.data))
