"""Authenticators: nobody is asked, keys from the command line, keys from a file."""

from __future__ import annotations

import hmac
import logging
import os
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from cluster.auth.contracts import Authenticator, Caller
from cluster.auth.keys import KeyFile, KeyRecord, digest_of, id_of, read_keys
from penstock.errors import AuthenticationError, PenstockError

_log = logging.getLogger(__name__)
LONGEST_KEY = 512
RELOAD_S = 1.0
"""A change of the key file, a revocation too, holds at most this much later."""


def open_authenticator(
    *, api_keys: Sequence[str] = (), keys_file: str | None = None
) -> Authenticator:
    """The one for these settings. Raises UsageError for a key file that cannot be read."""
    if keys_file is not None:
        return FileKeys(Path(keys_file), also=api_keys)
    return FixedKeys(api_keys) if api_keys else OpenDoor()


class OpenDoor:
    """No key is asked for; everybody is the same tenant."""

    def authenticate(self, authorization: str | None) -> Caller:
        return Caller("default")

    def close(self) -> None:
        return


class FixedKeys:
    """`--api-key`: each key is a tenant of its own, without limits."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [digest_of(key) for key in keys]

    def authenticate(self, authorization: str | None) -> Caller:
        caller = self.match(bearer(authorization))
        if caller is None:
            raise AuthenticationError("this API key is not valid here")
        return caller

    def match(self, key: str) -> Caller | None:
        """Compares with every key, each in constant time."""
        digest = digest_of(key)
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return Caller(digest.hex(), digest.hex()[:12]) if any(matches) else None

    def close(self) -> None:
        return


class FileKeys:
    """Keys of a file, which may change while it is used (also a mounted Secret, whose links are
    swapped). A file that has become wrong or has gone changes nothing: the last good one holds,
    and the log says so.
    """

    def __init__(
        self,
        path: Path,
        *,
        also: Sequence[str] = (),
        reload_s: float = RELOAD_S,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """`also`: keys of the command line. Raises UsageError if the file cannot be used."""
        self._path = path
        self._now = now
        self._fixed = FixedKeys(also)
        # Before the read: a write in between is then seen as a change.
        self._seen = _stamp(path)
        self._records = _by_id(read_keys(path))
        # A stranger's id costs the same comparison as a known one.
        self._nobody = secrets.token_bytes(32)
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=self._watch, args=(reload_s,), name="api-keys", daemon=True
        )
        self._thread.start()

    def authenticate(self, authorization: str | None) -> Caller:
        key = bearer(authorization)
        record = self._records.get(id_of(key) or "")
        wanted = bytes.fromhex(record.sha256) if record is not None else self._nobody
        if hmac.compare_digest(digest_of(key), wanted) and record is not None:
            return self._valid(record)
        caller = self._fixed.match(key)
        if caller is None:
            raise AuthenticationError("this API key is not valid here")
        return caller

    def _valid(self, record: KeyRecord) -> Caller:
        """Only who has the whole key learns that it has ended."""
        state = record.state(self._now())
        if state != "active":
            raise AuthenticationError(
                f"this API key has {'expired' if state == 'expired' else 'been revoked'}; "
                "ask for a new one",
                code=f"{state}_api_key",
            )
        return record.caller()

    def reload(self) -> bool:
        """Read the file again if it has changed. Whether its keys are in use now."""
        stamp = _stamp(self._path)
        if stamp == self._seen:
            return False
        self._seen = stamp
        try:
            self._records = _by_id(read_keys(self._path))
        except PenstockError as error:
            _log.error("%s; the keys read before stay in use", error.message)
            return False
        _log.warning("read %d API keys again from %s", len(self._records), self._path)
        return True

    def close(self) -> None:
        self._stop.set()

    def _watch(self, reload_s: float) -> None:
        while not self._stop.wait(reload_s):
            self.reload()


def bearer(authorization: str | None) -> str:
    """The key of a header. Raises AuthenticationError if there is none."""
    scheme, _, key = (authorization or "").partition(" ")
    key = key.strip()
    if scheme.lower() != "bearer" or not key:
        raise AuthenticationError("send the API key as 'Authorization: Bearer KEY'")
    if len(key) > LONGEST_KEY:
        raise AuthenticationError("this API key is not valid here")
    return key


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """Changes when the file does. Follows links, which is how a mounted Secret changes."""
    try:
        found = os.stat(path)  # noqa: PTH116  the same call, without making an object a second
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size


def _by_id(file: KeyFile) -> Mapping[str, KeyRecord]:
    return {record.id: record for record in file.keys}
