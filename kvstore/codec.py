"""Stored form of an object: u32le header length, `ObjectHeader`, payload; and its verification.

Whatever the bytes are, decoding raises nothing but `BlockIntegrityError`. The digest is BLAKE3 over
the whole object, so that a header cannot be paired with another payload.
"""

from __future__ import annotations

import asyncio
import struct
from dataclasses import dataclass

from blake3 import blake3
from google.protobuf.message import DecodeError

from kvstore.contracts import Buffer, StoreObject
from kvstore.layout import MAX_HEADER_BYTES, payload_bytes
from penstock.blocks import CacheLayout, ObjectKind
from penstock.errors import BlockIntegrityError, InvalidRequestError
from protos.penstock.kv.v1 import kv_pb2

VERSION = 1
ID_BYTES = 32
DIGEST_BYTES = 32
_INLINE_HASH_BYTES = 1 << 17

_LENGTH = struct.Struct("<I")
_TO_WIRE: dict[ObjectKind, kv_pb2.ObjectKind.ValueType] = {
    ObjectKind.BLOCK: kv_pb2.OBJECT_KIND_BLOCK,
    ObjectKind.STATE: kv_pb2.OBJECT_KIND_STATE,
}
_FROM_WIRE: dict[int, ObjectKind] = {number: kind for kind, number in _TO_WIRE.items()}


@dataclass(frozen=True)
class Encoded:
    """An object ready to be sent: `prefix` (length and header), then `payload`, uncopied."""

    kind: ObjectKind
    id: bytes
    prefix: bytes
    payload: memoryview
    digest: bytes

    @property
    def size_bytes(self) -> int:
        return len(self.prefix) + len(self.payload)


def wire_kind(kind: ObjectKind) -> kv_pb2.ObjectKind.ValueType:
    return _TO_WIRE[kind]


def object_kind(number: int) -> ObjectKind:
    """Raises InvalidRequestError for a number that names no kind."""
    kind = _FROM_WIRE.get(number)
    if kind is None:
        raise InvalidRequestError(f"object kind {number} is neither block nor state")
    return kind


def check_id(id_: bytes) -> bytes:
    """`id_` itself. Raises InvalidRequestError unless it has 32 bytes."""
    if len(id_) != ID_BYTES:
        raise InvalidRequestError(f"an object id has {ID_BYTES} bytes, not {len(id_)}")
    return id_


def encode_prefix(item: StoreObject, *, fingerprint: bytes, layout: CacheLayout) -> bytes:
    """Length and header of `item`. Raises InvalidRequestError if the payload does not fit."""
    check_id(item.id)
    try:
        expected = payload_bytes(layout, item.kind, item.index)
    except ValueError as error:
        raise InvalidRequestError(str(error)) from error
    size = memoryview(item.payload).nbytes
    if size != expected:
        raise InvalidRequestError(
            f"{item.kind.value} {item.index} has {size} payload bytes, its layout says {expected}"
        )
    header = kv_pb2.ObjectHeader(
        version=VERSION,
        kind=_TO_WIRE[item.kind],
        id=item.id,
        parent=item.parent,
        fingerprint=fingerprint,
        index=item.index,
        layout=layout.to_json(),
        payload_bytes=expected,
    ).SerializeToString(deterministic=True)
    return _LENGTH.pack(len(header)) + header


async def encode(item: StoreObject, *, fingerprint: bytes, layout: CacheLayout) -> Encoded:
    """`item` framed and hashed; large payloads are hashed in a thread."""
    prefix = encode_prefix(item, fingerprint=fingerprint, layout=layout)
    payload = memoryview(item.payload).cast("B")
    digest = await digest_of(prefix, payload)
    return Encoded(item.kind, item.id, prefix, payload, digest)


async def digest_of(*parts: Buffer) -> bytes:
    """BLAKE3 of the parts in order; off the event loop if they are larger than 128 KiB."""
    if sum(len(part) for part in parts) > _INLINE_HASH_BYTES:
        return await asyncio.to_thread(digest_now, *parts)
    return digest_now(*parts)


def digest_now(*parts: Buffer) -> bytes:
    hasher = blake3()
    for part in parts:
        hasher.update(part)
    return hasher.digest()


def read_header(raw: Buffer) -> tuple[kv_pb2.ObjectHeader, memoryview]:
    """Header and payload of a whole object, framing checked only.

    Raises BlockIntegrityError.
    """
    view = memoryview(raw)
    if len(view) < _LENGTH.size:
        raise BlockIntegrityError(f"an object of {len(view)} bytes has no header")
    (length,) = _LENGTH.unpack_from(view)
    if length > MAX_HEADER_BYTES or _LENGTH.size + length > len(view):
        raise BlockIntegrityError(f"a header of {length} bytes does not fit its object")
    try:
        header = kv_pb2.ObjectHeader.FromString(bytes(view[_LENGTH.size : _LENGTH.size + length]))
    except DecodeError as error:
        raise BlockIntegrityError("an object's header cannot be parsed") from error
    payload = view[_LENGTH.size + length :]
    if header.version != VERSION:
        raise BlockIntegrityError(f"object version {header.version} is unknown")
    if header.payload_bytes != len(payload):
        raise BlockIntegrityError(
            f"an object's header promises {header.payload_bytes} payload bytes, it has "
            f"{len(payload)}"
        )
    return header, payload


def decode_verified(
    raw: Buffer, *, id_: bytes, fingerprint: bytes, layout: CacheLayout
) -> StoreObject:
    """The object in `raw`, all checked but the digest, which the caller has compared already.

    The payload is a view of `raw`. Raises BlockIntegrityError.
    """
    header, payload = read_header(raw)
    if header.id != id_:
        raise BlockIntegrityError("an object's header names another id than the one asked for")
    kind = _FROM_WIRE.get(header.kind)
    if kind is None:
        raise BlockIntegrityError(f"object kind {header.kind} is neither block nor state")
    if header.fingerprint != fingerprint:
        raise BlockIntegrityError("an object was computed under another fingerprint")
    if header.layout != layout.to_json():
        raise BlockIntegrityError("an object's component table is not this model's")
    try:
        expected = payload_bytes(layout, kind, header.index)
    except ValueError as error:
        raise BlockIntegrityError(str(error)) from error
    if len(payload) != expected:
        raise BlockIntegrityError(
            f"{kind.value} {header.index} has {len(payload)} payload bytes, its layout says "
            f"{expected}"
        )
    return StoreObject(kind, id_, header.parent, header.index, payload)


def decode(
    raw: Buffer, *, id_: bytes, digest: bytes, fingerprint: bytes, layout: CacheLayout
) -> StoreObject:
    """Digest first, then everything else: see `decode_verified`. Raises BlockIntegrityError."""
    if digest_now(raw) != digest:
        raise BlockIntegrityError("an object's bytes do not match their BLAKE3 digest")
    return decode_verified(raw, id_=id_, fingerprint=fingerprint, layout=layout)
