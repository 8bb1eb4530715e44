"""Progress of loading: a bar on a terminal, log lines elsewhere."""

from __future__ import annotations

import io
import logging

import pytest

from model import progress
from model.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar_with_bytes_per_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    with Progress("Loading tiny", 3 << 20, stream=stream) as bar:
        bar.add(1 << 20)
        bar.add(2 << 20)
    print(repr(stream.getvalue()[-200:]))
    assert "Loading tiny" in stream.getvalue()
    assert "MiB" in stream.getvalue()


def test_elsewhere_lines_are_logged_now_and_then_and_at_the_end(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    with (
        caplog.at_level(logging.INFO, logger="model.progress"),
        Progress("Loading tiny", 4 << 30, stream=stream) as bar,
    ):
        for _ in range(4):
            now[0] += 6.0
            bar.add(1 << 30)
    lines = [record.getMessage() for record in caplog.records]
    print("\n".join(lines))
    assert not stream.getvalue()
    assert lines == [
        "Loading tiny: 2.00 of 4.00 GiB in 12.0 s, 171 MiB/s",
        "Loading tiny: 4.00 of 4.00 GiB in 24.0 s, 171 MiB/s",
        "Loading tiny: 4.00 of 4.00 GiB in 24.0 s, 171 MiB/s",
    ]
