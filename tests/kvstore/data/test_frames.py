"""The format of the data connection: what is sent arrives, and whatever is not that is refused."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.data import frames
from kvstore.data.frames import (
    CHUNK_BYTES,
    What,
    receive_answer,
    receive_chunk,
    receive_request,
    send_answer,
    send_object,
    send_request,
)
from kvstore.data.link import Link, LinkError


@contextmanager
def links() -> Iterator[tuple[Link, Link]]:
    ends = tuple(Link(end) for end in socket.socketpair())
    try:
        yield ends[0], ends[1]
    finally:
        for end in ends:
            end.end()


def received(link: Link, size: int) -> bytes:
    room = memoryview(bytearray(size))
    filled = 0
    while filled < size:
        filled += len(receive_chunk(link, room[filled:], 5))
    return bytes(room)


def raw_of(parts: list[bytes], start: int) -> bytes:
    """What an object is on the wire."""
    with links() as (near, far):
        sending = threading.Thread(
            target=lambda: (
                send_object(near, [memoryview(part) for part in parts], 5, start=start),
                near.close(),
            )
        )
        sending.start()
        raw = bytearray()
        byte = memoryview(bytearray(1))
        while far.receive_first(byte, 5):
            raw += byte
        sending.join()
    return bytes(raw)


@settings(max_examples=60, deadline=None)
@given(
    parts=st.lists(st.binary(max_size=40), max_size=4),
    start=st.integers(0, 60),
    chunk=st.integers(1, 50),
)
def test_an_object_arrives_from_any_offset_in_chunks_of_any_size(
    parts: list[bytes], start: int, chunk: int
) -> None:
    whole = b"".join(parts)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(frames, "CHUNK_BYTES", chunk)
        with links() as (near, far):
            send_object(near, [memoryview(part) for part in parts], 5, start=start)
            assert received(far, max(0, len(whole) - start)) == whole[start:]
            near.close()
            assert not far.receive_first(memoryview(bytearray(1)), 5)


def test_a_large_object_goes_in_chunks_of_at_most_a_mebibyte() -> None:
    whole = bytes(range(256)) * (10 * CHUNK_BYTES // 1024)
    with links() as (near, far):
        sending = threading.Thread(
            target=send_object, args=(near, [memoryview(b"head"), memoryview(whole)], 5)
        )
        sending.start()
        assert received(far, 4 + len(whole)) == b"head" + whole
        sending.join()
        near.send([memoryview((CHUNK_BYTES + 1).to_bytes(4, "little") + bytes(8))], 5)
        with pytest.raises(LinkError) as caught:
            receive_chunk(far, memoryview(bytearray(2 * CHUNK_BYTES)), 5)
    assert caught.value.reason == "garbage"


@settings(max_examples=80, deadline=None)
@given(payload=st.binary(min_size=1, max_size=50), place=st.integers(0), bit=st.integers(0, 7))
def test_a_flipped_bit_anywhere_is_refused(payload: bytes, place: int, bit: int) -> None:
    raw = bytearray(raw_of([payload], 0))
    raw[place % len(raw)] ^= 1 << bit
    with links() as (near, far):
        near.send([memoryview(raw)], 5)
        near.close()
        with pytest.raises(LinkError):
            receive_chunk(far, memoryview(bytearray(len(payload))), 5)


@settings(max_examples=40, deadline=None)
@given(raw=st.binary(max_size=80))
def test_garbage_is_no_request_and_no_chunk(raw: bytes) -> None:
    for receive in (
        lambda link: receive_request(link, 0.5, 0.5),
        lambda link: receive_chunk(link, memoryview(bytearray(64)), 0.5),
        lambda link: receive_answer(link, 0.5),
    ):
        with links() as (near, far):
            near.send([memoryview(raw)], 5)
            near.close()
            try:
                came = receive(far)
            except LinkError as error:
                assert error.reason in ("magic", "cut", "damaged", "garbage")
            else:
                # Nothing at all, or bytes that happen to be an answer of their own length.
                assert came is None or bytes(came) == raw[4 : 4 + len(came)]


def test_a_stranger_is_not_listened_to_for_longer_than_the_magic() -> None:
    with links() as (near, far):
        near.send([memoryview(b"GET ")], 5)
        with pytest.raises(LinkError) as caught:
            receive_request(far, 5, 5)
    assert caught.value.reason == "magic"


@given(what=st.sampled_from([What.GET, What.PUT]), ticket=st.binary(min_size=32, max_size=32))
@settings(max_examples=20, deadline=None)
def test_requests_and_answers_come_as_they_went(what: What, ticket: bytes) -> None:
    with links() as (near, far):
        send_request(near, what, ticket, 5)
        assert receive_request(far, 5, 5) == (what, ticket)
        send_answer(far, ticket * 3, 5)
        assert receive_answer(near, 5) == ticket * 3


def test_every_step_has_a_deadline() -> None:
    with links() as (near, far):
        for step in (
            lambda: far.receive(memoryview(bytearray(1)), 0.05),
            lambda: receive_request(far, 0.05, 0.05),
            lambda: near.send([memoryview(bytes(64 << 20))], 0.05),
        ):
            with pytest.raises(LinkError) as caught:
                step()
            assert caught.value.reason == "silent"
