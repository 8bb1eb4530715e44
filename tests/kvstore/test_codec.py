"""Framing and verification: what comes in whole comes out equal, and nothing else comes out."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.codec import decode, decode_verified, digest_now, encode_prefix
from kvstore.contracts import StoreObject
from kvstore.layout import MAX_HEADER_BYTES, largest_object_bytes, payload_bytes
from kvstore.wire import data_of, encode_data, encode_first, first_of, slices
from penstock.blocks import CacheLayout, Component, ComponentKind, ObjectKind
from penstock.errors import BlockIntegrityError, PenstockError
from protos.penstock.kv.v1 import kv_pb2
from tests.kvstore.objects import FINGERPRINT, LAYOUT, block, chain, state

CHAIN = chain(2, tail=100)
BLOCK = block(CHAIN, 1)


def framed(item: StoreObject, *, fingerprint: bytes = FINGERPRINT) -> bytes:
    prefix = encode_prefix(item, fingerprint=fingerprint, layout=LAYOUT)
    return prefix + bytes(item.payload)


def read(raw: bytes, id_: bytes, digest: bytes | None = None) -> StoreObject:
    digest = digest_now(raw) if digest is None else digest
    return decode(raw, id_=id_, digest=digest, fingerprint=FINGERPRINT, layout=LAYOUT)


@given(position=st.integers(1, 612), index=st.integers(0, 1))
def test_round_trip(position: int, index: int) -> None:
    for item in (state(CHAIN, position), block(CHAIN, index)):
        raw = framed(item)
        assert len(raw) <= largest_object_bytes(LAYOUT)
        back = read(raw, item.id)
        assert (back.kind, back.parent, back.index) == (item.kind, item.parent, item.index)
        assert bytes(back.payload) == item.payload


@settings(max_examples=300)
@given(data=st.data(), mask=st.integers(1, 255))
def test_any_flipped_byte_is_refused(data: st.DataObject, mask: int) -> None:
    raw = bytearray(framed(BLOCK))
    digest = digest_now(bytes(raw))
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= mask
    with pytest.raises(BlockIntegrityError, match="BLAKE3"):
        read(bytes(raw), BLOCK.id, digest)


@settings(max_examples=300)
@given(data=st.data(), mask=st.integers(1, 255))
def test_a_damaged_header_under_a_right_digest_raises_nothing_else(
    data: st.DataObject, mask: int
) -> None:
    """A node that hashes what it has after the damage: only the header's own checks are left."""
    raw = bytearray(framed(BLOCK))
    header_bytes = len(raw) - len(BLOCK.payload)
    raw[data.draw(st.integers(0, header_bytes - 1))] ^= mask
    try:
        back = read(bytes(raw), BLOCK.id)
    except BlockIntegrityError:
        return
    # Parent and block index are the caller's to compare; all else must have been refused.
    assert (back.kind, back.id, len(back.payload)) == (BLOCK.kind, BLOCK.id, len(BLOCK.payload))


@given(raw=st.binary(max_size=400))
def test_garbage_raises_integrity_errors_only(raw: bytes) -> None:
    with pytest.raises(BlockIntegrityError):
        read(raw, BLOCK.id)


@given(cut=st.integers(1, 3000))
def test_a_cut_object_is_refused(cut: int) -> None:
    raw = framed(BLOCK)
    with pytest.raises(BlockIntegrityError):
        read(raw[: max(0, len(raw) - cut)], BLOCK.id)


def test_what_is_wrong_is_named() -> None:
    raw = framed(BLOCK)

    def check(
        match: str, *, raw: bytes = raw, layout: CacheLayout = LAYOUT, **change: bytes
    ) -> None:
        arguments = {"id_": BLOCK.id, "fingerprint": FINGERPRINT} | change
        with pytest.raises(BlockIntegrityError, match=match):
            decode_verified(raw, layout=layout, **arguments)

    check("another id", id_=b"\0" * 32)
    check("another fingerprint", fingerprint=b"\0" * 32)
    renamed = CacheLayout((Component("x", ComponentKind.COMPRESSED, 4, 40), *LAYOUT.components[1:]))
    check("component table", layout=renamed)
    check("no header", raw=b"\1\0")
    check(
        "does not fit", raw=(MAX_HEADER_BYTES + 1).to_bytes(4, "little") + bytes(MAX_HEADER_BYTES)
    )
    check("promises", raw=raw + b"\0")
    for field, value, match in (
        ("version", 2, "version 2"),
        ("kind", 0, "kind 0"),
        ("kind", 7, "kind 7"),
        ("layout", "[]", "component table"),
    ):
        header = kv_pb2.ObjectHeader.FromString(raw[4 : len(raw) - len(BLOCK.payload)])
        setattr(header, field, value)
        text = header.SerializeToString()
        check(match, raw=len(text).to_bytes(4, "little") + text + bytes(BLOCK.payload))


@given(position=st.integers(1, 10**7))
def test_no_object_is_larger_than_the_reader_s_bound(position: int) -> None:
    size = payload_bytes(LAYOUT, ObjectKind.STATE, position)
    assert size + 4 + MAX_HEADER_BYTES <= largest_object_bytes(LAYOUT)


def test_a_wrong_id_is_refused_before_it_is_sent() -> None:
    wrong = StoreObject(ObjectKind.BLOCK, b"short", b"", 0, BLOCK.payload)
    with pytest.raises(PenstockError, match="32 bytes"):
        framed(wrong)


@given(chunk=st.binary(max_size=40_000))
def test_hand_framed_data_is_what_protobuf_reads_and_writes(chunk: bytes) -> None:
    message = encode_data(chunk)
    assert kv_pb2.PutRequest.FromString(message).data == chunk
    assert kv_pb2.GetResponse.FromString(message).data == chunk
    assert message == kv_pb2.PutRequest(data=chunk).SerializeToString()
    assert data_of(message) == chunk


@given(raw=st.binary(max_size=60))
def test_what_looks_like_data_is_data_to_protobuf_too(raw: bytes) -> None:
    chunk = data_of(raw)
    if chunk is not None:
        assert kv_pb2.PutRequest.FromString(raw).data == chunk


@given(st.binary(max_size=400), st.binary(max_size=40), st.integers(0, 400))
def test_a_first_message_with_its_head_is_what_protobuf_writes(
    head: bytes, id_: bytes, cut: int
) -> None:
    fields = kv_pb2.PutBegin(id=id_, size_bytes=cut).SerializeToString()
    message = encode_first(fields, [head[:cut], memoryview(head)[cut:]])
    parsed = kv_pb2.PutRequest.FromString(message).begin
    assert (parsed.id, parsed.size_bytes, parsed.head) == (id_, cut, head)
    assert first_of(message) == (fields, head)
    # The same field numbers carry an object's first message of Get.
    assert kv_pb2.GetResponse.FromString(message).start.head == head


@given(st.binary(max_size=40), st.integers(0, 3))
def test_bytes_that_only_look_like_a_first_message_are_left_to_protobuf(
    raw: bytes, start: int
) -> None:
    raw = b"\x0a\x20\x3a"[:start] + raw
    found = first_of(raw)
    if found is not None:
        fields, head = found
        assert encode_first(fields, [head])[-len(fields) - len(head) :] == bytes(head) + fields


@given(st.binary(max_size=300), st.integers(1, 301))
def test_slices_are_equal_and_within_their_bound(data: bytes, most_bytes: int) -> None:
    parts = slices(memoryview(data), most_bytes)
    assert b"".join(parts) == data
    sizes = [len(part) for part in parts]
    assert max(sizes) <= most_bytes and len(set(sizes[:-1])) <= 1
    assert len(parts) <= max(1, -(-len(data) // most_bytes))
