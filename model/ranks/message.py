"""An engine call as a framed message: a JSON head and the raw bytes beside it. No pickle.

What may be an argument: None, bool, int, float, str, bytes, lists and tuples (they arrive as
tuples), frozen sets, the dataclasses that `model.engine` speaks of, and sequences, which travel as
their number.
"""

from __future__ import annotations

import json
import socket
import struct
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import model.engine as contract

_FRAME = struct.Struct(">II")
_MOST_HEAD_BYTES = 64 << 20
_FEW_INTEGERS = 16
_KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}
Json = dict[str, Any]


class Pack:
    """Encodes arguments; `buffers` are the bytes beside the head."""

    def __init__(self, number_of: Callable[[object], int | None]) -> None:
        """`number_of` gives a sequence's number, None for anything else."""
        self._number_of = number_of
        self._size = 0
        self.buffers: list[contract.Buffer] = []

    def value(self, value: Any) -> Any:
        """JSON for `value`. Raises `TypeError` for what cannot travel."""
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, bytes | bytearray | memoryview):
            return {"bytes": self._lay_down(value)}
        if isinstance(value, list | tuple):
            if len(value) > _FEW_INTEGERS and all(type(item) is int for item in value):
                return {"integers": self._lay_down(memoryview(array("q", value)).cast("B"))}
            return [self.value(item) for item in value]
        if isinstance(value, frozenset):
            return {"set": [self.value(item) for item in value]}
        number = self._number_of(value)
        if number is not None:
            return {"sequence": number}
        kind = type(value).__name__
        if not is_dataclass(value) or getattr(contract, kind, None) is not type(value):
            raise TypeError(f"a {kind} cannot travel between ranks")
        named = {field.name: self.value(getattr(value, field.name)) for field in fields(value)}
        return {"record": kind, "fields": named}

    def _lay_down(self, data: contract.Buffer) -> list[int]:
        place = [self._size, len(data)]
        self.buffers.append(data)
        self._size += len(data)
        return place


def unpack(value: Any, data: memoryview, sequences: Mapping[int, object]) -> Any:
    """The argument that `Pack.value` encoded. Bytes are views of `data`."""
    if isinstance(value, list):
        return tuple(unpack(item, data, sequences) for item in value)
    if not isinstance(value, dict):
        return value
    if "bytes" in value:
        return _part(value["bytes"], data)
    if "integers" in value:
        return tuple(_part(value["integers"], data).cast("q"))
    if "set" in value:
        return frozenset(unpack(item, data, sequences) for item in value["set"])
    if "sequence" in value:
        return sequences[value["sequence"]]
    named = {name: unpack(item, data, sequences) for name, item in value["fields"].items()}
    return getattr(contract, value["record"])(**named)


def _part(place: Sequence[int], data: memoryview) -> memoryview:
    first, size = place
    return data[first : first + size]


class Channel:
    """One connection between rank 0 and a follower. Blocking; closing it twice is allowed."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # A machine that vanished without a word must be noticed by those that wait for it.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEPALIVE.items():
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    @property
    def own_address(self) -> str:
        """This side's address, over which the other machine reached it."""
        return str(self._socket.getsockname()[0])

    def fileno(self) -> int:
        return self._socket.fileno()

    def set_timeout(self, seconds: float | None) -> None:
        self._socket.settimeout(seconds)

    def send(self, head: Json, buffers: Sequence[contract.Buffer] = ()) -> None:
        """Raises `OSError` if the other side is gone or does not read within the timeout."""
        text = json.dumps(head, separators=(",", ":")).encode()
        size = sum(len(part) for part in buffers)
        self._socket.sendall(b"".join((_FRAME.pack(len(text), size), text, *buffers)))

    def receive(self, *, most_bytes: int | None = None) -> tuple[Json, memoryview]:
        """Raises `EOFError` at the other side's end, `OSError` if the connection breaks."""
        head_size, size = _FRAME.unpack(self._exactly(_FRAME.size))
        if head_size > _MOST_HEAD_BYTES or (most_bytes and head_size + size > most_bytes):
            raise EOFError("what came is no message of a rank")
        head = json.loads(bytes(self._exactly(head_size)))
        return head, self._exactly(size)

    def _exactly(self, size: int) -> memoryview:
        data = memoryview(bytearray(size))
        at = 0
        while at < size:
            got = self._socket.recv_into(data[at:])
            if not got:
                raise EOFError("the other rank has closed the connection")
            at += got
        return data

    def close(self) -> None:
        self._socket.close()
