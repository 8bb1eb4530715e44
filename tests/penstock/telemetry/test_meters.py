"""Values stay bounded whatever is thrown at them; expositions of many processes merge into one."""

from __future__ import annotations

import re
import threading
from collections import Counter

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from penstock.telemetry import catalog as M
from penstock.telemetry.exporter import HttpExporter
from penstock.telemetry.merge import merge
from penstock.telemetry.meters import Meters
from penstock.telemetry.metric import OTHER
from penstock.telemetry.workers import worker_meters
from penstock.telemetry_spec import TelemetrySpec

Series = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def series(text: bytes) -> Series:
    found: Series = {}
    for family in text_string_to_metric_families(text.decode()):
        for sample in family.samples:
            key = sample.name, tuple(sorted(sample.labels.items()))
            assert key not in found, f"twice: {key}"
            found[key] = sample.value
    return found


@given(values=st.lists(st.text(max_size=20), max_size=200))
@settings(max_examples=8, deadline=None)
def test_no_value_of_a_label_makes_series_without_end(values: list[str]) -> None:
    meters = Meters("front")
    for value in values:
        meters.add(M.RESPONSES, route=value, status="200")
        meters.add(M.REQUESTS, endpoint=value, outcome="stop")
    found = series(meters.text())
    routes = [labels for name, labels in found if name == "penstock_http_responses_total"]
    endpoints = [labels for name, labels in found if name == "penstock_requests_total"]
    assert len(routes) <= M.RESPONSES.labels[0].bound
    assert len(endpoints) <= M.REQUESTS.labels[0].bound
    total = sum(v for (name, _), v in found.items() if name == "penstock_http_responses_total")
    assert total == len(values), "what has no label value of its own still counts"
    if not set(values) <= {*M.ENDPOINTS}:
        assert any(("endpoint", OTHER) in labels for labels in endpoints)


@given(amounts=st.lists(st.integers(0, 10_000), min_size=1, max_size=5), junk=st.binary())
@settings(max_examples=8, deadline=None)
def test_merging_keeps_every_series_of_every_process_once(amounts: list[int], junk: bytes) -> None:
    texts = [Meters("front").text()]
    for place, amount in enumerate(amounts):
        worker = worker_meters("prefill", f"prefill-{place}")
        worker.read(M.PREFILL_COMPUTED, lambda amount=amount: amount)
        worker.add(M.TRANSFER_BYTES, amount, direction="put")
        texts.append(worker.text())
    merged = merge([*texts, junk])
    want: Series = {}
    for text in texts:
        want |= series(text)
    assert series(merge(texts)) == want
    heads = Counter(re.findall(rb"^# TYPE (\S+)", merged, re.MULTILINE))
    assert max(heads.values()) == 1, "a scraper refuses a family that begins twice"
    for place, amount in enumerate(amounts):
        name = f'worker_prefill_computed_tokens_total{{role="prefill",worker="prefill-{place}"}}'
        assert f"penstock_{name} {float(amount)}".encode() in merged


def test_aliases_show_the_same_figures() -> None:
    meters = Meters("store")
    meters.read(M.STORE_EVICTIONS, lambda: 7)
    found = series(meters.text())
    assert found["penstock_store_evictions_total", ()] == 7
    assert found["penstock_store_evictions", ()] == 7


def test_only_what_is_declared_for_a_process_can_be_measured_there() -> None:
    with pytest.raises(KeyError):
        Meters("store").add(M.REQUESTS, endpoint="chat", outcome="stop")
    with pytest.raises(ValueError, match="cannot be read"):
        Meters("front").read(M.TTFT, lambda: 1.0)


async def test_the_http_exporter_reads_on_the_loop_and_stops() -> None:
    threads: set[str] = set()

    def source() -> float:
        threads.add(threading.current_thread().name)
        return 3.0

    meters = Meters("store")
    meters.read(M.STORE_OBJECTS, source)
    exporter = HttpExporter(meters, TelemetrySpec(metrics_port=0))
    address = exporter.start()
    async with httpx.AsyncClient(trust_env=False) as client:
        answer = await client.get(f"http://{address}/metrics")
        assert "penstock_store_objects 3.0" in answer.text
        assert threads == {threading.current_thread().name}
        taken = HttpExporter(meters, TelemetrySpec(metrics_port=int(str(address).split(":")[1])))
        assert taken.start() is None, "a taken port must not stop a process from serving"
        exporter.close()
        exporter.close()
        with pytest.raises(httpx.ConnectError):
            await client.get(f"http://{address}/metrics")


async def test_without_a_port_nothing_listens() -> None:
    assert HttpExporter(Meters("store"), TelemetrySpec()).start() is None
