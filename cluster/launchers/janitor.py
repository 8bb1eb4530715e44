"""Sweeps up after a launcher that was killed: `python -m cluster.launchers.janitor PID DIRECTORY`.

Ray's own processes end with their driver, but its agents look for their dead parent only now and
then. The janitor notes the launcher's descendants while it lives; when its stdin ends without the
line `done`, it kills those that are left and removes the directory. Linux only (it reads /proc);
elsewhere it does nothing.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import sys
import time
from pathlib import Path

_PERIOD_S = 1.0
_GRACE_S = 1.0
Process = tuple[int, int]
"""Process id and start time in clock ticks: together they name one process for ever."""


def processes(proc: Path = Path("/proc")) -> dict[int, tuple[int, int]]:
    """Every process: id -> (parent, start time)."""
    found = {}
    for entry in proc.glob("[0-9]*"):
        try:
            # The name in parentheses may hold anything, so fields are counted behind the last one.
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        found[int(entry.name)] = (int(fields[1]), int(fields[19]))
    return found


def descendants(root: int, every: dict[int, tuple[int, int]]) -> set[Process]:
    children: dict[int, list[int]] = {}
    for pid, (parent, _) in every.items():
        children.setdefault(parent, []).append(pid)
    found, pending = set(), [root]
    while pending:
        for pid in children.get(pending.pop(), ()):
            if pid != os.getpid():
                found.add((pid, every[pid][1]))
                pending.append(pid)
    return found


def _kill(known: set[Process]) -> None:
    alive = {pid: started for pid, (_, started) in processes().items()}
    for pid, started in known:
        if alive.get(pid) == started:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)


def main(launcher: int, directory: Path) -> int:
    known: set[Process] = set()
    # Ctrl-C is the launcher's business; the janitor leaves when its stdin ends.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    text = b""
    while True:
        known |= descendants(launcher, processes())
        ready, _, _ = select.select([0], [], [], _PERIOD_S)
        if ready:
            got = os.read(0, 4096)
            text += got
            if not got:
                break
    if text.strip() != b"done":
        time.sleep(_GRACE_S)
        _kill(known)
        shutil.rmtree(directory, ignore_errors=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(int(sys.argv[1]), Path(sys.argv[2])))
