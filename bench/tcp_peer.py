"""The far end of a plain TCP connection: the yardstick of `penstock bench store`.

`python -m bench.tcp_peer`: prints its port, serves one connection on loopback, ends with it. A
request is one byte (`p`: bytes follow, `g`: send bytes) and their number in 8 bytes.
"""

from __future__ import annotations

import socket
import struct

HEAD = struct.Struct(">cQ")
PUT, GET = b"p", b"g"
CHUNK_BYTES = 1 << 20


def receive(connection: socket.socket, count: int, buffer: bytearray) -> None:
    """`count` bytes, each part over the last one. Raises ConnectionError if the peer ends."""
    view = memoryview(buffer)
    while count:
        got = connection.recv_into(view[: min(count, len(buffer))])
        if not got:
            raise ConnectionError("the peer has ended")
        count -= got


def main() -> int:
    buffer, payload = bytearray(CHUNK_BYTES), bytes(CHUNK_BYTES)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(60)
        print(server.getsockname()[1], flush=True)
        connection, _ = server.accept()
    with connection:
        connection.settimeout(60)
        while True:
            head = connection.recv(HEAD.size, socket.MSG_WAITALL)
            if len(head) < HEAD.size:
                return 0
            what, count = HEAD.unpack(head)
            if what == PUT:
                receive(connection, count, buffer)
                connection.sendall(b"k")
            else:
                for start in range(0, count, CHUNK_BYTES):
                    connection.sendall(payload[: min(CHUNK_BYTES, count - start)])


if __name__ == "__main__":
    raise SystemExit(main())
