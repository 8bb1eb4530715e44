"""Metrics stay bounded and count once; log lines carry the request's id."""

from __future__ import annotations

import io
import json
import logging

import pytest
from prometheus_client.parser import text_string_to_metric_families

from penstock.errors import OverloadedError, PenstockError
from penstock.request import Usage
from penstock.telemetry import JsonFormatter, Telemetry, configure_logging, request_scope


def values(telemetry: Telemetry) -> dict[str, float]:
    text = telemetry.exposition().decode()
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


def test_a_failed_request_counts_its_code_and_a_strange_code_as_other() -> None:
    telemetry = Telemetry()
    telemetry.request("chat").fail(OverloadedError("full"))
    telemetry.request("nobody's endpoint").fail(PenstockError("x", code="said by a client"))
    found = values(telemetry)
    assert found["penstock_request_failures_total['overloaded']"] == 1
    assert found["penstock_request_failures_total['other']"] == 1
    assert found["penstock_requests_total['chat', 'refused']"] == 1
    assert found["penstock_requests_total['failed', 'other']"] == 1
    assert found["penstock_requests_running[]"] == 0


def test_phases_come_from_the_flow_and_add_up() -> None:
    telemetry = Telemetry()
    timings = {"reserve_s": 0.5, "ttft_s": 2.0, "prefill_s": 1.9, "total_s": 5.0}
    telemetry.request("chat", max_tokens=64).end("stop", Usage(100, 40, 2), timings)
    found = values(telemetry)
    phases = {n: found[f"penstock_request_{n}_time_seconds_sum[]"] for n in ("queue", "inference")}
    assert phases == {"queue": 0.5, "inference": 4.5}
    assert found["penstock_request_prefill_time_seconds_sum[]"] == 1.5
    assert found["penstock_request_decode_time_seconds_sum[]"] == 3.0
    assert found["penstock_request_params_max_tokens_sum[]"] == 64


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
