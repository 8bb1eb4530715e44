"""The data messages of Put and Get, framed by hand: one copy each way instead of three.

Both streams carry their bytes in field 2 of a oneof, so that such a message is the tag 0x12, a
varint length and the bytes. Anything that does not look exactly so is left to protobuf: any
client's encoding is understood.
"""

from __future__ import annotations

from kvstore.contracts import Buffer

_TAG = 0x12
_MAX_VARINT_BYTES = 5


def encode_data(chunk: Buffer) -> bytes:
    """A PutRequest or GetResponse that holds `chunk` as its `data`."""
    head = bytearray([_TAG])
    length = len(chunk)
    while length > 0x7F:
        head.append(length & 0x7F | 0x80)
        length >>= 7
    head.append(length)
    return b"".join((head, chunk))


def data_of(raw: bytes) -> memoryview | None:
    """The `data` of such a message without a copy; None if `raw` must go to protobuf."""
    if not raw or raw[0] != _TAG:
        return None
    length = 0
    for place, byte in enumerate(raw[1 : 1 + _MAX_VARINT_BYTES]):
        length |= (byte & 0x7F) << (7 * place)
        if byte < 0x80:
            start = place + 2
            return memoryview(raw)[start:] if len(raw) - start == length else None
    return None
