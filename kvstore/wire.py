"""The messages of Put and Get that carry bytes, framed by hand: one copy each way, not three.

Both streams carry data in field 2 of a oneof, so that such a message is the tag 0x12, a varint
length and the bytes. An object's first message is field 1 of it; field 7 of that one are the
object's first bytes, which are written before its other fields. Anything that does not look exactly
so is left to protobuf: any client's encoding is understood.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvstore.contracts import Buffer

_TAG = 0x12
_FIRST_TAG = 0x0A
_HEAD_TAG = 0x3A
_MAX_VARINT_BYTES = 5


def encode_data(chunk: Buffer) -> bytes:
    """A PutRequest or GetResponse that holds `chunk` as its `data`."""
    return b"".join((bytes([_TAG]), _varint(len(chunk)), chunk))


def data_of(raw: bytes) -> memoryview | None:
    """The `data` of such a message without a copy; None if `raw` must go to protobuf."""
    found = _field(raw, 0, _TAG)
    return memoryview(raw)[found[0] :] if found is not None and found[1] == len(raw) else None


def slices(data: memoryview, most_bytes: int) -> list[memoryview]:
    """`data` in at least one part of at most `most_bytes`: equal ones, since a message with a short
    rest costs nearly as much time as a full one.
    """
    count = max(1, -(-len(data) // most_bytes))
    step = max(1, -(-len(data) // count))
    return [data[start : start + step] for start in range(0, max(1, len(data)), step)]


def encode_first(fields: bytes, head: Sequence[Buffer]) -> bytes:
    """A PutRequest or GetResponse whose PutBegin or GetStart has these serialised `fields`, and the
    parts of `head` one after the other as its `head`.
    """
    size = _varint(sum(map(len, head)))
    inner = 1 + len(size) + sum(map(len, head)) + len(fields)
    return b"".join((bytes([_FIRST_TAG]), _varint(inner), bytes([_HEAD_TAG]), size, *head, fields))


def first_of(raw: bytes) -> tuple[bytes, memoryview] | None:
    """What `encode_first` was given, the head without a copy; None if `raw` must go to protobuf."""
    outer = _field(raw, 0, _FIRST_TAG)
    if outer is None or outer[1] != len(raw):
        return None
    head = _field(raw, outer[0], _HEAD_TAG)
    if head is None:
        return None
    return raw[head[1] :], memoryview(raw)[head[0] : head[1]]


def _varint(number: int) -> bytes:
    digits = bytearray()
    while number > 0x7F:
        digits.append(number & 0x7F | 0x80)
        number >>= 7
    digits.append(number)
    return bytes(digits)


def _field(raw: bytes, at: int, tag: int) -> tuple[int, int] | None:
    """Start and end of the bytes of the field at `at`; None unless it has this tag and fits."""
    if raw[at : at + 1] != bytes([tag]):
        return None
    length = 0
    for place, byte in enumerate(raw[at + 1 : at + 1 + _MAX_VARINT_BYTES]):
        length |= (byte & 0x7F) << (7 * place)
        if byte < 0x80:
            start = at + place + 2
            return (start, start + length) if start + length <= len(raw) else None
    return None
