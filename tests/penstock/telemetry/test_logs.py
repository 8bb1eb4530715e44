"""Log lines as a collector reads them: one object a line, tracebacks only of what went wrong."""

from __future__ import annotations

import asyncio
import json
import logging

from penstock.telemetry.logs import JsonFormatter


def line_of(error: BaseException) -> dict[str, object]:
    try:
        raise error
    except BaseException as raised:
        info = (type(raised), raised, raised.__traceback__)
    record = logging.LogRecord("uvicorn.error", logging.ERROR, "x", 1, "in an app", (), info)
    text = JsonFormatter("front").format(record)
    assert "\n" not in text
    line: dict[str, object] = json.loads(text)
    return line


def test_an_error_keeps_its_traceback() -> None:
    line = line_of(ValueError("wrong"))
    assert "ValueError: wrong" in str(line["traceback"])
    assert (line["level"], line["process"]) == ("error", "front")


def test_work_that_was_cancelled_at_a_shutdown_is_no_error_to_look_at() -> None:
    line = line_of(asyncio.CancelledError("timeout graceful shutdown exceeded"))
    assert line["cancelled"] == "timeout graceful shutdown exceeded"
    assert "traceback" not in line
