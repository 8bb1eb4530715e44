"""Metrics stay bounded and count once; log lines carry the request's id."""

from __future__ import annotations

import io
import json
import logging

import pytest
from prometheus_client.parser import text_string_to_metric_families

from penstock.request import Usage
from penstock.telemetry import JsonFormatter, Sample, Telemetry, configure_logging, request_scope


def values(telemetry: Telemetry, *extra: Sample) -> dict[str, float]:
    text = telemetry.exposition(extra).decode()
    families = text_string_to_metric_families(text)
    return {s.name + str(sorted(s.labels.values())): s.value for f in families for s in f.samples}


def test_a_request_is_counted_once() -> None:
    telemetry = Telemetry()
    meter = telemetry.request("chat")
    meter.text()
    meter.text()
    meter.end("stop", Usage(100, 40, 2))
    meter.end("cancelled")
    found = values(telemetry)
    assert found["penstock_requests_total['chat', 'stop']"] == 1
    assert "penstock_requests_total['cancelled', 'chat']" not in found
    assert found["penstock_requests_running[]"] == 0
    assert found["penstock_prompt_tokens_cached_total[]"] == 40
    assert found["penstock_inter_token_seconds_count[]"] == 1
    assert set(meter.timings()) == {"ttft_s", "e2e_s"}


def test_what_others_report_cannot_grow_without_bound() -> None:
    telemetry = Telemetry()
    flood = [Sample("worker_x", 1.0, {"worker": f"w{i}" * 100}) for i in range(2000)]
    odd = [Sample("worker_x", 1.0, {"other": "label"}), Sample("bad name!\n", 2.0, {})]
    found = values(telemetry, *flood, *odd)
    assert sum(name.startswith("penstock_worker_x") for name in found) == 512
    assert found["penstock_bad_name__[]"] == 2.0


def test_two_telemetries_share_nothing() -> None:
    one, other = Telemetry(), Telemetry()
    one.request("chat")
    assert values(other)["penstock_requests_running[]"] == 0


def test_log_lines_are_json_with_the_request_id() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    logger = logging.Logger("room")
    logger.addHandler(handler)
    with request_scope("req-1"):
        logger.info("done %s", "well\n", extra={"facts": {"took_s": 1}})
    logger.info("outside")
    first, second = map(json.loads, stream.getvalue().splitlines())
    assert (first["message"], first["request_id"], first["took_s"]) == ("done well\n", "req-1", 1)
    assert "request_id" not in second


def test_configure_logging_replaces_the_handlers(monkeypatch: pytest.MonkeyPatch) -> None:
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", list(root.handlers))
    monkeypatch.setattr(root, "level", root.level)
    stream = io.StringIO()
    configure_logging(level="warning", stream=stream)
    logging.getLogger("x").warning("seen")
    logging.getLogger("x").info("not seen")
    assert [json.loads(line)["message"] for line in stream.getvalue().splitlines()] == ["seen"]
