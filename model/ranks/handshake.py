"""Rank 0's door: a listening socket, and the proof that who knocks was sent by rank 0.

The token reaches a follower by its starter (stdin, or a call of its actor), never by argv.
It does not travel over the connection: both sides prove that they know it.
"""

from __future__ import annotations

import hmac
import secrets
import socket
import time
from collections.abc import Callable
from hashlib import sha256

from model.ranks.message import Channel
from penstock.errors import UnavailableError

_MOST_BYTES = 4096
_PROOF_TIMEOUT_S = 5.0
_POLL_S = 0.1


def _proof(token: str, role: str, nonce: str) -> str:
    return hmac.new(bytes.fromhex(token), f"{role} {nonce}".encode(), sha256).hexdigest()


class Door:
    """Listens on `host`; `close` it once all are in."""

    def __init__(self, host: str) -> None:
        self.token = secrets.token_hex(32)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.socket(family, socket.SOCK_STREAM)
        self._socket.bind((host, 0))
        self._socket.listen()
        self._socket.settimeout(_POLL_S)
        self.port = int(self._socket.getsockname()[1])

    def admit(
        self, ranks: set[int], *, timeout_s: float, alive: Callable[[], None]
    ) -> dict[int, Channel]:
        """Channels of exactly these ranks. `alive` raises if one of them has ended.

        Raises `UnavailableError` after the timeout. Whoever cannot prove itself is hung up on.
        """
        found: dict[int, Channel] = {}
        deadline = time.monotonic() + timeout_s
        while set(found) != ranks:
            alive()
            if time.monotonic() > deadline:
                missing = ", ".join(str(rank) for rank in sorted(ranks - set(found)))
                raise UnavailableError(f"rank {missing} did not come within {timeout_s:.0f} s")
            try:
                connection, _ = self._socket.accept()
            except TimeoutError:
                continue
            channel = Channel(connection)
            channel.set_timeout(_PROOF_TIMEOUT_S)
            try:
                rank = self._prove(channel)
            except (OSError, EOFError, ValueError, KeyError, TypeError, RecursionError):
                rank = -1
            if rank in ranks and rank not in found:
                found[rank] = channel
            else:
                channel.close()
        return found

    def _prove(self, channel: Channel) -> int:
        nonce = secrets.token_hex(16)
        channel.send({"nonce": nonce})
        head, _ = channel.receive(most_bytes=_MOST_BYTES)
        rank = int(head["rank"])
        if not hmac.compare_digest(str(head["proof"]), _proof(self.token, f"rank {rank}", nonce)):
            raise ValueError("wrong proof")
        channel.send({"proof": _proof(self.token, "rank 0", str(head["nonce"]))})
        return rank

    def close(self) -> None:
        self._socket.close()


def knock(host: str, port: int, *, token: str, rank: int) -> Channel:
    """A follower's side. Raises `OSError` or `EOFError` if that is not rank 0, or it refuses."""
    channel = Channel(socket.create_connection((host, port), timeout=_PROOF_TIMEOUT_S))
    try:
        head, _ = channel.receive(most_bytes=_MOST_BYTES)
        nonce = secrets.token_hex(16)
        mine = _proof(token, f"rank {rank}", str(head["nonce"]))
        channel.send({"rank": rank, "proof": mine, "nonce": nonce})
        head, _ = channel.receive(most_bytes=_MOST_BYTES)
        if not hmac.compare_digest(str(head["proof"]), _proof(token, "rank 0", nonce)):
            raise EOFError("this is not rank 0")
    except BaseException:
        channel.close()
        raise
    channel.set_timeout(None)
    return channel
