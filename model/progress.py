"""Progress of loading: a bar with bytes per second on a terminal, else a few log lines."""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as Bar

_log = logging.getLogger(__name__)
_LINE_EVERY_S = 10.0


class Progress:
    """Counts bytes up to `total_bytes`. One rank of a replica has one, the others have None."""

    def __init__(self, label: str, total_bytes: int, *, stream: TextIO | None = None) -> None:
        stream = sys.stderr if stream is None else stream
        self._label, self._total = label, total_bytes
        self._done = 0
        self._start = self._last = time.monotonic()
        self._bar: Bar | None = None
        if stream.isatty():
            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                DownloadColumn(binary_units=True),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
                console=Console(file=stream),
                transient=True,
            )
            self._task = self._bar.add_task(label, total=total_bytes)
            self._bar.start()

    def add(self, count: int) -> None:
        self._done += count
        if self._bar is not None:
            self._bar.advance(self._task, count)
        elif time.monotonic() - self._last >= _LINE_EVERY_S:
            self._last = time.monotonic()
            _log.info("%s", self._line())

    def _line(self) -> str:
        seconds = max(time.monotonic() - self._start, 1e-9)
        return (
            f"{self._label}: {self._done / 2**30:.2f} of {self._total / 2**30:.2f} GiB in "
            f"{seconds:.1f} s, {self._done / seconds / 2**20:.0f} MiB/s"
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        if error is None:
            _log.info("%s", self._line())
