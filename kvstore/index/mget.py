"""One `MGET` of a whole prompt, without what a client library spends on each key and value.

redis-py encodes every argument on its own and would make as many objects of the answer: for 4,096
ids 2.7 ms and 3.6 ms beside 1.4 ms on the wire and in Redis. Here the command is one join, and
equal values (blocks of one node have one size) become one object.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from redis.exceptions import RedisError

Value = TypeVar("Value")


def packed_mget(prefix: bytes, ids: Sequence[bytes]) -> bytes:
    """The command for keys `prefix + id`, in Redis' protocol; ids must be of one length."""
    length = len(prefix) + len(ids[0])
    if any(len(id_) != len(ids[0]) for id_ in ids):
        raise ValueError("ids of several lengths")
    before_key = b"\r\n$%d\r\n%b" % (length, prefix)
    return b"".join(
        (b"*%d\r\n$4\r\nMGET" % (len(ids) + 1), before_key, before_key.join(ids), b"\r\n")
    )


async def mget(pool: Any, prefix: bytes, ids: Sequence[bytes]) -> list[object]:
    """Values in the order of `ids`, over a connection of redis-py's `pool`.

    Raises RedisError, also for an answer that is none. May be cancelled at any moment.
    """
    command = packed_mget(prefix, ids)
    connection = await pool.get_connection()
    try:
        await connection.send_packed_command(command)
        values = await connection.read_response()
        if not isinstance(values, list) or len(values) != len(ids):
            raise RedisError("MGET was answered for another number of keys")
    except BaseException:
        # The answer may still come, and would be taken for the next command's.
        await connection.disconnect(nowait=True)
        raise
    finally:
        await pool.release(connection)
    return values


def read_all(
    values: Sequence[object], read: Callable[[object], Value | None]
) -> list[Value | None]:
    """`read` of each value, called once for equal ones."""
    known: dict[object, Value | None] = {None: None}
    found = []
    for value in values:
        if value not in known:
            known[value] = read(value)
        found.append(known[value])
    return found
