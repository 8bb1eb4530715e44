"""A disk that can stop at any system call: `Medium` stands where `kvstore.disk` says `os`.

Each call that changes a file is a step. At the chosen step the process is killed (after a part of
the bytes, if it was a write) or the disk refuses; after a kill nothing reaches the files any more.
What a power cut may take away is played on the folder: bytes that were never synced, names that
were never synced.
"""

from __future__ import annotations

import errno
import os
import random
import time
from pathlib import Path
from typing import Any

import pytest

from kvstore.disk import files as files_module
from kvstore.disk import log as log_module


class KilledError(BaseException):
    """kill -9: no handler of the product may catch it."""


class Medium:
    """`os` for the disk tier. Not more than one folder is used with it."""

    def __init__(self) -> None:
        self.steps = 0
        self.kill_at: int | None = None
        self.refuse_at: range = range(0)
        self.torn = 0.0
        self.slow_s = 0.0
        self.dead = False
        self.refused = 0
        self._synced: dict[int, int] = {}
        self._new_names: set[str] = set()
        self._log_before: bytes | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    # What `kvstore.disk` calls

    def write(self, fd: int, data: bytes | memoryview) -> int:
        part = int(len(data) * self.torn)
        if self._step():
            os.write(fd, bytes(data)[:part])
            self._stop()
        return os.write(fd, data)

    def open(self, path: Any, flags: int, mode: int = 0o777) -> int:
        fresh = bool(flags & os.O_CREAT) and not Path(path).exists()
        if fresh and self._step():
            self._stop()
        if fresh:
            self._new_names.add(Path(path).name)
        return os.open(path, flags, mode)

    def ftruncate(self, fd: int, length: int) -> None:
        # Undoes a write that was refused: a disk that refuses can still do that.
        if self.dead:
            self._stop()
        os.ftruncate(fd, length)

    def fdatasync(self, fd: int) -> None:
        if self._step():
            self._stop()
        stat = os.fstat(fd)
        self._synced[stat.st_ino] = stat.st_size

    def fsync(self, fd: int) -> None:
        self.fdatasync(fd)
        self._new_names.clear()
        self._log_before = None

    # What its paths call

    def replace(self, old: Path, new: Path) -> None:
        if self._step():
            self._stop()
        if self._log_before is None and new.exists():
            raw = new.read_bytes()
            self._log_before = raw[: self._synced.get(new.stat().st_ino, 0)]
        old.replace(new)
        self._new_names.discard(old.name)

    def unlink(self, path: Path) -> None:
        if self._step():
            self._stop()
        path.unlink()

    # What a test does

    def kill(self) -> None:
        """Nothing reaches the files from now on."""
        self.dead = True

    def cut_power(self, folder: Path, rng: random.Random) -> None:
        """Take from the folder what was never synced: all of it, a part, or zeros in its place.

        Deletions are taken as done: the worst case.
        """
        for path in sorted(folder.iterdir()):
            if path.name in self._new_names and rng.random() < 0.5:
                path.unlink()
                continue
            if path.name == "catalog.log" and self._log_before is not None and rng.random() < 0.5:
                path.write_bytes(self._log_before)
                continue
            stat = path.stat()
            synced = min(self._synced.get(stat.st_ino, 0), stat.st_size)
            kept = rng.randint(synced, stat.st_size)
            if rng.random() < 0.5:
                os.truncate(path, kept)
            else:
                with path.open("r+b") as file:
                    file.seek(kept)
                    file.write(bytes(stat.st_size - kept))

    def _step(self) -> bool:
        """Must this call stop?"""
        if self.dead:
            raise KilledError
        self.steps += 1
        time.sleep(self.slow_s)
        return self.steps - 1 == self.kill_at or self.steps - 1 in self.refuse_at

    def _stop(self) -> None:
        if self.steps - 1 in self.refuse_at:
            self.refused += 1
            raise OSError(errno.ENOSPC, "No space left on device")
        self.dead = True
        raise KilledError


class MediumPath(type(Path())):  # type: ignore[misc]
    """A path whose changes are steps of `medium`."""

    medium: Medium | Switch

    def unlink(self, missing_ok: bool = False) -> None:
        if missing_ok and not self.exists():
            return
        self.medium.unlink(Path(self))

    def replace(self, target: Any) -> Any:
        self.medium.replace(Path(self), Path(target))
        return target

    def open(self, mode: str = "r", *arguments: Any, **named: Any) -> Any:
        if "w" not in mode:
            return super().open(mode, *arguments, **named)
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        return _File(self.medium, self.medium.open(Path(self), flags, 0o600))


class _File:
    """Unbuffered, so that each record of a rewritten log is a step."""

    def __init__(self, medium: Medium | Switch, fd: int) -> None:
        self._medium, self._fd = medium, fd

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def write(self, data: bytes) -> int:
        return self._medium.write(self._fd, data)

    def flush(self) -> None:
        return None

    def fileno(self) -> int:
        return self._fd


def path_on(medium: Medium | Switch, folder: Path) -> Path:
    """`folder` as a path whose changes go through `medium`."""
    kind = type("Path", (MediumPath,), {"medium": medium})
    made: Path = kind(folder)
    return made


class Switch:
    """`os` of the disk tier's modules, handed on to the medium of the current life."""

    def __init__(self) -> None:
        self.medium = Medium()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.medium, name)


@pytest.fixture
def switch(monkeypatch: pytest.MonkeyPatch) -> Switch:
    """The disk tier over a `Medium` for one test."""
    made = Switch()
    monkeypatch.setattr(files_module, "os", made)
    monkeypatch.setattr(log_module, "os", made)
    return made
