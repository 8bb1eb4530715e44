"""A node's epoch: a number for each life, larger than that of every earlier life.

Wall clock milliseconds, or one more than the last life's where the clock went back. The last life's
is kept as decimal digits in the file `epoch` of the disk tier's folder; a node without a disk has
its clock only.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

_FILE = "epoch"
_MAX_DIGITS = 18


def wall_ms() -> int:
    return time.time_ns() // 1_000_000


def next_epoch(folder: Path | None, *, now_ms: int | None = None) -> int:
    """This life's epoch, remembered in `folder` before it is used. Never raises for a bad folder:
    opening the disk tier says what is wrong with it.
    """
    now_ms = wall_ms() if now_ms is None else now_ms
    if folder is None:
        return now_ms
    epoch = max(now_ms, _last(folder) + 1)
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        _replace(folder / _FILE, b"%d\n" % epoch)
    except OSError:
        return epoch
    return epoch


def _last(folder: Path) -> int:
    """0 for a file that is missing or no number: then the clock decides."""
    try:
        with (folder / _FILE).open("rb") as file:
            text = file.read(_MAX_DIGITS + 2).strip()
    except OSError:
        return 0
    return int(text) if text.isdigit() and len(text) <= _MAX_DIGITS else 0


def _replace(path: Path, text: bytes) -> None:
    """All or nothing, also after a power cut."""
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    with draft.open("wb") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
