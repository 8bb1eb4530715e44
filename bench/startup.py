"""How long the command line takes to say anything, beside an interpreter that does nothing."""

from __future__ import annotations

import subprocess
import sys
import time

from bench.report import Row
from bench.stats import low_median_high, ratio

REPEATS = 5


def rows(repeats: int = REPEATS) -> list[Row]:
    """The two take turns, so that a busy moment of the machine hits both."""
    commands = {
        "python -c pass": [sys.executable, "-c", "pass"],
        "penstock --help": [sys.executable, "-m", "cluster.cli", "--help"],
    }
    times: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(repeats):
        for name, command in commands.items():
            began_s = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=60)
            times[name].append(time.perf_counter() - began_s)
    least = low_median_high(times["python -c pass"])[1]
    result: list[Row] = []
    for name, taken in times.items():
        low, middle, high = low_median_high(taken)
        result.append(
            {
                "command": name,
                "n": repeats,
                "median_ms": middle * 1e3,
                "low_ms": low * 1e3,
                "high_ms": high * 1e3,
                "ratio": ratio(middle, least),
            }
        )
    return result
