"""What travels on a data connection. All integers are little endian.

    request   "PKD1" | u8 what (1 get, 2 put) | 32 bytes ticket
    chunk     u32 length | u64 XXH3-64 of the bytes | the bytes
    get       the ticket's objects one after the other, each in chunks
    put       the same towards the node, 32 bytes BLAKE3 after each object; then, from the node:
              u32 length | OfferResult

A connection serves one request after the other. Whatever else comes ends it: there are no errors on
the wire, since gRPC tells them.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from enum import IntEnum

from xxhash import xxh3_64

from kvstore.data.link import Link, LinkError

MAGIC = b"PKD1"
TICKET_BYTES = 32
CHUNK_BYTES = 1 << 20
"""Most bytes of a chunk; a longer one is none."""
_REQUEST = struct.Struct(f"<4sB{TICKET_BYTES}s")
_CHUNK = struct.Struct("<IQ")
_LENGTH = struct.Struct("<I")
MOST_ANSWER_BYTES = 1 << 20


class What(IntEnum):
    GET = 1
    PUT = 2
    PLACE = 3
    """Not on a data connection: the writer has written into the node's memory."""


def send_request(link: Link, what: What, ticket: bytes, timeout_s: float) -> None:
    """Raises LinkError, as all here does for a link that fails or bytes that are none."""
    link.send([memoryview(_REQUEST.pack(MAGIC, what, ticket))], timeout_s)


def receive_request(link: Link, first_byte_s: float, timeout_s: float) -> tuple[What, bytes] | None:
    """None: the peer has closed it between two requests."""
    raw = bytearray(_REQUEST.size)
    view = memoryview(raw)
    if not link.receive_first(view[:1], first_byte_s):
        return None
    # Whoever does not know the protocol is not listened to for as long as a request takes.
    link.receive(view[1 : len(MAGIC)], timeout_s)
    if raw[: len(MAGIC)] != MAGIC:
        raise LinkError("magic", "a peer does not speak the data protocol")
    link.receive(view[len(MAGIC) :], timeout_s)
    _, what, ticket = _REQUEST.unpack(raw)
    if what not in (What.GET, What.PUT):
        raise LinkError("magic", f"a request asks for {what}")
    return What(what), ticket


def send_object(
    link: Link, parts: Sequence[memoryview], timeout_s: float, *, start: int = 0
) -> None:
    """The bytes of `parts` together from `start` on, in equal chunks."""
    size = sum(map(len, parts)) - start
    if size <= 0:
        return
    count = -(-size // CHUNK_BYTES)
    step = -(-size // count)
    for offset in range(start, start + size, step):
        some = list(_cut(parts, offset, min(offset + step, start + size)))
        hasher = xxh3_64()
        for part in some:
            hasher.update(part)
        head = _CHUNK.pack(sum(map(len, some)), hasher.intdigest())
        link.send([memoryview(head), *some], timeout_s)


def receive_chunk(link: Link, room: memoryview, timeout_s: float) -> memoryview:
    """The next chunk, at the start of `room`. Raises LinkError also for a longer or damaged one."""
    head = bytearray(_CHUNK.size)
    link.receive(memoryview(head), timeout_s)
    length, digest = _CHUNK.unpack(head)
    if not 0 < length <= min(CHUNK_BYTES, len(room)):
        raise LinkError("garbage", f"a chunk of {length} bytes does not fit")
    chunk = room[:length]
    link.receive(chunk, timeout_s)
    if xxh3_64(chunk).intdigest() != digest:
        raise LinkError("damaged", "a chunk's bytes do not match their XXH3")
    return chunk


def send_answer(link: Link, raw: bytes, timeout_s: float) -> None:
    link.send([memoryview(_LENGTH.pack(len(raw)) + raw)], timeout_s)


def receive_answer(link: Link, timeout_s: float) -> bytes:
    head = bytearray(_LENGTH.size)
    link.receive(memoryview(head), timeout_s)
    (length,) = _LENGTH.unpack(head)
    if length > MOST_ANSWER_BYTES:
        raise LinkError("garbage", f"an answer of {length} bytes does not fit")
    raw = bytearray(length)
    link.receive(memoryview(raw), timeout_s)
    return bytes(raw)


def _cut(parts: Sequence[memoryview], start: int, stop: int) -> Iterator[memoryview]:
    """What of `parts` together lies between two offsets."""
    for part in parts:
        if start < len(part) and stop > 0:
            yield part[max(0, start) : stop]
        start, stop = start - len(part), stop - len(part)
