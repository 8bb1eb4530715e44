"""Changes of a key file: one at a time, and never half written."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import orjson

from cluster.auth.keys import KeyFile, KeyRecord, NewKey, read_keys
from penstock.errors import UsageError


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One writer at a time, also among processes. The lock is a file of its own: the key file
    itself is replaced by each write.
    """
    lock = path.with_name(f".{path.name}.lock")
    try:
        handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise UsageError(
            f"cannot write beside {path}: {error.strerror}; choose another --file"
        ) from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def add_key(path: Path, make: Callable[[Sequence[str]], NewKey]) -> NewKey:
    """Adds what `make(ids in use)` gives; a file that is not there yet is made, mode 0600."""
    with _locked(path):
        file = read_keys(path) if path.exists() else KeyFile()
        fresh = make([key.id for key in file.keys])
        _write(path, (*file.keys, fresh.record))
        return fresh


def revoke_key(path: Path, key_id: str) -> KeyRecord:
    """Marks it, so that the list still tells of it. Raises UsageError for an unknown id."""
    with _locked(path):
        file = read_keys(path)
        found = next((key for key in file.keys if key.id == key_id), None)
        if found is None:
            raise UsageError(
                f"{path} has no key with the id '{key_id[:64]}'; see `penstock keys list`"
            )
        revoked = found.model_copy(update={"revoked": True})
        _write(path, tuple(revoked if key is found else key for key in file.keys))
        return revoked


def _write(path: Path, keys: tuple[KeyRecord, ...]) -> None:
    content = KeyFile(keys=keys).model_dump(mode="json", exclude_none=True)
    if path.suffix == ".json":
        text = orjson.dumps(content, option=orjson.OPT_INDENT_2) + b"\n"
    else:
        import yaml

        text = yaml.safe_dump(content, sort_keys=False).encode()
    mode = path.stat().st_mode & 0o777 if path.exists() else 0o600
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, mode)  # noqa: PTH101
            os.replace(name, path)  # noqa: PTH105
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise UsageError(f"cannot write the key file {path}: {error.strerror}") from error
