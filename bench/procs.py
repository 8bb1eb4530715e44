"""CPU time and memory of processes, from /proc. Ours are found as descendants of this process."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_PROC = Path("/proc")


@dataclass(frozen=True)
class Process:
    pid: int
    parent: int
    cpu_s: float
    """User and system time of all its threads since its start."""
    resident_bytes: int
    command: str


def parse_stat(line: str) -> tuple[int, float, int]:
    """Parent, CPU seconds and resident bytes of a line of /proc/PID/stat."""
    # The name stands in parentheses and may hold spaces and parentheses itself.
    fields = line.rpartition(")")[2].split()
    cpu_s = (int(fields[11]) + int(fields[12])) / _TICKS_PER_S
    return int(fields[1]), cpu_s, int(fields[21]) * os.sysconf("SC_PAGE_SIZE")


def all_processes() -> list[Process]:
    found = []
    for entry in _PROC.iterdir():
        if not entry.name.isdigit():
            continue
        try:
            parent, cpu_s, resident = parse_stat((entry / "stat").read_text())
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except (OSError, ValueError, IndexError):
            # It has ended meanwhile, or is not ours to read.
            continue
        found.append(Process(int(entry.name), parent, cpu_s, resident, command.strip()))
    return found


def descendants(processes: Iterable[Process], root: int) -> list[Process]:
    """All below `root`, without itself."""
    children: dict[int, list[Process]] = {}
    for process in processes:
        children.setdefault(process.parent, []).append(process)
    found: list[Process] = []
    waiting = [root]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += [p.pid for p in below]
    return found


def cpu_by(part_of: Callable[[str], str], *, root: int | None = None) -> dict[str, float]:
    """CPU seconds of the descendants so far, summed by the part that `part_of` names."""
    sums: dict[str, float] = {}
    for process in descendants(all_processes(), os.getpid() if root is None else root):
        part = part_of(process.command)
        sums[part] = sums.get(part, 0.0) + process.cpu_s
    return sums


def part_of(command: str) -> str:
    """Which part of a cluster a command line is: front, proxy, decode, prefill, store, rest."""
    program = Path(command.split(" ", 1)[0]).name
    if program == "haproxy" or command.startswith("ray::ProxyActor"):
        return "proxy"
    if command.startswith("ray::HAProxyManager"):
        return "proxy"
    for part in ("front", "decode", "prefill"):
        if command.startswith(f"ray::ServeReplica:{part}:"):
            return part
    for module, part in (
        ("cluster.front", "front"),
        ("decode", "decode"),
        ("prefill", "prefill"),
        ("kvstore", "store"),
    ):
        if f" -m {module} " in f"{command} ":
            return part
    return "rest"
