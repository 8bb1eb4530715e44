"""One `MGET` of a prompt: the bytes that redis-py would send, and answers that stay in step."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis.asyncio import Connection
from redis.exceptions import RedisError

from kvstore.contracts import Location
from kvstore.index.mget import mget, packed_mget, read_all
from kvstore.index.redis import RedisIndex
from penstock.errors import IndexUnavailableError
from tests.kvstore.redis_server import running_redis


@given(
    prefix=st.binary(max_size=12),
    ids=st.integers(0, 40).flatmap(
        lambda size: st.lists(st.binary(min_size=size, max_size=size), min_size=1, max_size=30)
    ),
)
def test_the_command_is_the_one_that_redis_py_packs(prefix: bytes, ids: list[bytes]) -> None:
    expected = Connection().pack_command("MGET", *(prefix + id_ for id_ in ids))
    assert packed_mget(prefix, ids) == b"".join(expected)


def test_ids_of_several_lengths_are_refused() -> None:
    with pytest.raises(ValueError):
        packed_mget(b"k:", [b"ab", b"c"])


@given(st.lists(st.sampled_from([None, b"", b"a", b"bb", b"ccc"]), max_size=40))
def test_equal_values_are_read_once_and_all_are_placed(values: list[bytes | None]) -> None:
    asked: list[object] = []

    def read(value: object) -> int | None:
        asked.append(value)
        assert isinstance(value, bytes)
        return len(value) or None

    assert read_all(values, read) == [len(value) or None if value else None for value in values]
    assert len(asked) == len(set(asked)) == len({*values} - {None})


async def test_a_lookup_that_was_given_up_leaves_no_answer_for_the_next() -> None:
    ids = [number.to_bytes(32, "big") for number in range(5000)]
    with running_redis() as redis:
        index = RedisIndex(redis.url, lookup_timeout_s=1.0, max_connections=1)
        try:
            await index.add([(id_, Location("n", 1, place)) for place, id_ in enumerate(ids)])
            redis.command(b"CLIENT PAUSE 1400")
            with pytest.raises(IndexUnavailableError):
                await index.lookup(ids[:7])
            await asyncio.sleep(0.6)
            for start in (9, 4000):
                found = await index.lookup(ids[start : start + 900])
                sizes = [place.size_bytes for place in found if place is not None]
                assert sizes == list(range(start, start + 900))
        finally:
            await index.close()


class _Answers:
    """A pool and its one connection, which answers as it is told."""

    def __init__(self, answer: object) -> None:
        self.answer = answer
        self.disconnects = self.releases = 0

    async def get_connection(self) -> _Answers:
        return self

    async def release(self, _: object) -> None:
        self.releases += 1

    async def disconnect(self, *, nowait: bool) -> None:
        self.disconnects += nowait

    async def send_packed_command(self, _: bytes) -> None: ...

    async def read_response(self) -> object:
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer


@pytest.mark.parametrize("answer", [b"x", [], [None, None], {}, 3])
async def test_an_answer_that_is_none_is_an_error(answer: object) -> None:
    pool = _Answers(answer)
    with pytest.raises(RedisError):
        await mget(pool, b"kv:o:", [b"a" * 32])
    assert pool.releases == pool.disconnects == 1


@pytest.mark.parametrize("error", [OSError(), asyncio.CancelledError(), RedisError("LOADING")])
async def test_a_connection_that_may_owe_an_answer_is_closed(error: BaseException) -> None:
    pool = _Answers(error)
    with pytest.raises(type(error)):
        await mget(pool, b"kv:o:", [b"a" * 32])
    assert pool.releases == pool.disconnects == 1
