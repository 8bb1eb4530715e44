"""One request is one tree of spans across HTTP, route, prefill, store and decode."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="the extra otel is missing")

from cluster.launchers.common import free_port
from penstock.client import BatchClient, Document, JobOptions
from tests.cluster.harness import Cluster, cluster
from tests.penstock.telemetry.collector import Collector, Received

SERVICES = {"penstock-front", "penstock-prefill", "penstock-decode", "penstock-store"}
TOP = "POST /v1/completions"
WANTED = {
    ("encode", TOP),
    ("route", TOP),
    ("Prefill/Run", "prefill", TOP),
    ("queue", "Prefill/Run", "prefill", TOP),
    ("restore", "Prefill/Run", "prefill", TOP),
    ("KvStore/Has", "restore", "Prefill/Run", "prefill", TOP),
    ("compute", "Prefill/Run", "prefill", TOP),
    ("KvStore/Put", "Prefill/Run", "prefill", TOP),
    ("Decode/Generate", "decode", TOP),
    ("reserve", "Decode/Generate", "decode", TOP),
    ("attach", "Decode/Generate", "decode", TOP),
    ("KvStore/Get", "attach", "Decode/Generate", "decode", TOP),
    ("generate", "Decode/Generate", "decode", TOP),
}
"""Paths of spans that a request must have, each from the span up to the root."""
SECRET = "the code of bakilo is 4821"


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with Collector() as running:
        yield running


@pytest.fixture(scope="module")
def traced(collector: Collector, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(
        "fake",
        telemetry__otlp_endpoint=collector.endpoint,
        batch__grpc_port=free_port(),
        batch__journal_url=f"sqlite:///{tmp_path_factory.mktemp('journal')}/jobs.db",
    ) as running:
        yield running


def ask(c: Cluster, trace_id: str, prompt: str, **fields: object) -> str:
    """Asks as a client that traces; the id of its own span."""
    span_id = secrets.token_hex(8)
    body = {"model": "fake", "prompt": prompt, "max_tokens": 20, "ignore_eos": True} | fields
    headers = {"traceparent": f"00-{trace_id}-{span_id}-01"}
    answer = c.client.post("/v1/completions", json=body, headers=headers)
    assert answer.status_code == 200, answer.text
    return span_id


def complete(spans: list[Received]) -> bool:
    """Every process has told, and every parent that is named has come but the client's own."""
    known = {span.span_id for span in spans}
    rootless = [span.name for span in spans if span.parent_id not in known]
    return {span.service for span in spans} == SERVICES and rootless == [TOP]


def path_to_root(span: Received, spans: list[Received]) -> list[str]:
    by_id = {each.span_id: each for each in spans}
    names = [span.name]
    while span.parent_id in by_id:
        span = by_id[span.parent_id]
        names.append(span.name)
    return names


def test_a_request_is_one_tree_through_all_processes(traced: Cluster, collector: Collector) -> None:
    trace_id = secrets.token_hex(16)
    client_span = ask(traced, trace_id, SECRET * 40)

    def paths() -> set[tuple[str, ...]]:
        spans = collector.of_trace(trace_id)
        return {tuple(path_to_root(span, spans)) for span in spans}

    try:
        collector.wait_for(lambda _: paths() >= WANTED and complete(collector.of_trace(trace_id)))
    except AssertionError:
        pytest.fail(f"never came: {sorted(WANTED - paths())}; came: {sorted(paths())}")
    spans = collector.of_trace(trace_id)
    (root,) = [span for span in spans if span.parent_id == client_span]
    assert (root.name, root.service) == (TOP, "penstock-front")
    assert not any(span.failed for span in spans)
    assert all(span.begin_ns <= span.end_ns for span in spans)
    assert root.attributes["gen_ai.usage.output_tokens"] == "int_value: 20\n"
    print(f"{len(spans)} spans of {len(SERVICES)} services, one root")


def test_requests_side_by_side_are_trees_of_their_own(
    traced: Cluster, collector: Collector
) -> None:
    ids = [secrets.token_hex(16) for _ in range(6)]
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda i: ask(traced, i, f"{i} side by side " * 30), ids))
    for trace_id in ids:
        collector.wait_for(lambda _, i=trace_id: complete(collector.of_trace(i)))
        spans = collector.of_trace(trace_id)
        assert sum(span.name == "Decode/Generate" for span in spans) == 1
        assert sum(span.name == "Prefill/Run" for span in spans) == 1


def test_a_request_without_a_trace_begins_one_and_probes_do_not(
    traced: Cluster, collector: Collector
) -> None:
    before = len(collector.spans)
    for path in ("/health", "/ready", "/metrics", "/version"):
        assert traced.client.get(path).status_code == 200
    traced.complete("begins a trace", max_tokens=2)
    collector.wait_for(
        lambda spans: any(s.name.startswith("POST") and not s.parent_id for s in spans)
    )
    fresh = collector.spans[before:]
    assert not [s for s in fresh if "/metrics" in s.name or "/ready" in s.name or s.name == "GET"]


def posts(collector: Collector, trace_id: str) -> list[Received]:
    return [span for span in collector.of_trace(trace_id) if span.name.startswith("POST")]


def test_an_error_marks_its_spans_with_the_code(traced: Cluster, collector: Collector) -> None:
    trace_id = secrets.token_hex(16)
    headers = {"traceparent": f"00-{trace_id}-{secrets.token_hex(8)}-01"}
    body = {"model": "nobody", "prompt": "x"}
    assert traced.client.post("/v1/completions", json=body, headers=headers).status_code == 404
    collector.wait_for(lambda _: len(posts(collector, trace_id)) > 0)
    (root,) = posts(collector, trace_id)
    assert root.attributes["http.response.status_code"] == "int_value: 404\n"


def test_what_a_client_sends_as_a_trace_can_do_no_harm(traced: Cluster) -> None:
    for header in ("", "00-zz-zz-01", "00-" + "0" * 32 + "-" + "0" * 16 + "-01", "x" * 5000):
        answer = traced.client.post(
            "/v1/completions",
            json={"model": "fake", "prompt": "x", "max_tokens": 1},
            headers={"traceparent": header, "tracestate": "a=" + "b" * 600},
        )
        assert answer.status_code == 200


def test_a_document_of_a_batch_job_is_a_tree_too(traced: Cluster, collector: Collector) -> None:
    with BatchClient(f"127.0.0.1:{traced.config.batch.grpc_port}") as client:
        document = Document.from_text("side by side " * 60, ["first?", "second?"])
        job = client.submit([document], JobOptions(max_tokens=4))
        assert len(list(client.results(job.id, wait=True))) == 2

    def names() -> list[str]:
        (root,) = [s for s in collector.spans if s.name == "batch claim"] or [None]
        return [s.name for s in collector.of_trace(root.trace_id)] if root else []

    collector.wait_for(lambda _: names().count("Decode/Generate") == 2)
    assert names().count("Prefill/Run") == 2


def test_no_text_of_prompt_or_answer_is_sent(traced: Cluster, collector: Collector) -> None:
    assert collector.spans, "the tests before have sent spans"
    for piece in (SECRET.encode(), b"side by side", b"begins a trace"):
        assert piece not in collector.raw
