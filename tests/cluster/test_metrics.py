"""Every declared metric is really emitted by a running cluster and moves, or says why it cannot."""

from __future__ import annotations

import contextlib
import importlib.util
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from cluster.launchers.common import free_port
from penstock.client import BatchClient, Document, JobOptions
from penstock.errors import UnavailableError
from penstock.telemetry.catalog import CATALOG
from penstock.telemetry.metric import PREFIX
from protos.penstock.kv.v1 import kv_pb2, kv_pb2_grpc
from tests.cluster.harness import Cluster, cluster

_MEMORY_BYTES = 90_000
Values = dict[str, float]


def read(url: str) -> Values:
    """Sum over the series of each sample name, as a scraper reads them."""
    found: Values = {}
    for family in text_string_to_metric_families(httpx.get(url, timeout=10).text):
        for sample in family.samples:
            found[sample.name] = found.get(sample.name, 0.0) + sample.value
    return found


class Watcher:
    """The highest value that each sample had while it ran."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self.highest: Values = {}

    def __enter__(self) -> Watcher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.is_set():
            self.look()
            time.sleep(0.02)

    def look(self) -> None:
        for name, value in read(self._url).items():
            self.highest[name] = max(value, self.highest.get(name, 0.0))


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    port = free_port()
    with cluster(
        "fake",
        model__num_speculative_tokens=2,
        model__fake_prefill_tokens_per_s=6000.0,
        prefill__max_running=2,
        prefill__chunk_tokens=512,
        decode__max_running=2,
        kvstore__memory_bytes=_MEMORY_BYTES,
        telemetry__metrics_port=port,
        batch__grpc_port=free_port(),
        batch__journal_url=f"sqlite:///{tmp_path_factory.mktemp('journal')}/jobs.db",
    ) as started:
        yield started


def prompt(seed: int, tokens: int) -> list[int]:
    return [(seed * 7919 + i * (seed + 3)) % 250 for i in range(tokens)]


def traffic(c: Cluster) -> None:
    """Something of everything: hits, misses, equal prompts at once, a queue, drafts, evidence,
    refusals, a stream, a client that hangs up.
    """
    c.complete(prompt(3, 2600), max_tokens=1)
    fork = [*prompt(3, 300), *prompt(4, 100)]
    assert c.complete(fork, max_tokens=1).cached_tokens == 256 - 128, "replayed"
    first = c.complete(prompt(1, 900), max_tokens=300, ignore_eos=True)
    again = [*prompt(1, 900), *first.token_ids, 7]
    assert c.complete(again, max_tokens=8, ignore_eos=True, evidence=True).cached_tokens > 900
    with ThreadPoolExecutor(5) as pool:
        # Equal ones by themselves: a third would take the place in which the second computes too.
        list(pool.map(lambda _: c.complete(prompt(2, 1500), max_tokens=8), range(2)))
        list(pool.map(lambda n: c.complete(prompt(n, 600), max_tokens=8), range(20, 25)))
    body = {"model": "fake", "prompt": prompt(5, 4000), "max_tokens": 500, "ignore_eos": True}
    with c.client.stream("POST", "/v1/completions", json=body | {"stream": True}) as answer:
        next(answer.iter_raw())
    whole = {"model": "fake", "prompt": prompt(7, 50), "max_tokens": 8, "stream": True}
    assert c.client.post("/v1/completions", json=whole).text.endswith("[DONE]\n\n")
    too_long = {"model": "fake", "prompt": prompt(6, 200_000), "max_tokens": 1_000_000}
    assert c.client.post("/v1/completions", json=too_long).status_code == 400
    assert c.client.get("/nowhere").status_code == 404


def jobs(c: Cluster) -> None:
    """A batch job of two documents."""
    with BatchClient(f"127.0.0.1:{c.config.batch.grpc_port}") as client:
        texts = ["one " * 100, "two " * 100]
        documents = [Document.from_text(text, ["first?", "second?"]) for text in texts]
        job = client.submit(documents, JobOptions(max_tokens=4))
        assert len(list(client.results(job.id, wait=True))) == 4


def strange_reader(c: Cluster) -> None:
    """Holds an object open for writing and asks for one that nobody has."""
    begin = kv_pb2.PutBegin(id=b"x" * 32, kind=1, size_bytes=100, owner="me", lease_ttl_ms=1000)
    with c.store() as (channel, signed):
        stub = kv_pb2_grpc.KvStoreStub(channel)
        hold = threading.Event()

        def messages() -> Iterator[kv_pb2.PutRequest]:
            yield kv_pb2.PutRequest(begin=begin)
            hold.wait(10)

        puts = stub.Put(messages(), timeout=10, metadata=signed)
        next(puts)
        asked = kv_pb2.GetRequest(ids=[b"y" * 32])
        (absent,) = stub.Get(asked, timeout=5, metadata=signed)
        assert absent.missing.id
        time.sleep(0.3)
        hold.set()
        puts.cancel()


def test_every_metric_moves_or_says_why_it_cannot(running: Cluster) -> None:
    with Watcher(f"{running.url}/metrics") as watcher:
        traffic(running)
        jobs(running)
        strange_reader(running)
        watcher.look()
    highest = watcher.highest
    stuck, moved_anyway = [], []
    for metric in CATALOG:
        suffix = "_count" if metric.kind == "histogram" else ""
        for name in (metric.name, *metric.also):
            sample = PREFIX + name + suffix
            if not metric.labels:
                assert sample in highest, f"{sample} is declared but not shown"
            if not highest.get(sample) and not metric.still:
                stuck.append(sample)
            if highest.get(sample) and metric.still:
                moved_anyway.append(sample)
    print(f"{len(CATALOG)} metrics; still, as declared: {[m.name for m in CATALOG if m.still]}")
    assert not stuck, f"never moved and do not say why: {stuck}"
    assert not moved_anyway, f"moved though they say that they cannot: {moved_anyway}"


def test_figures_of_different_processes_agree(running: Cluster) -> None:
    before = read(f"{running.url}/metrics")
    answer = running.complete(prompt(11, 1000), max_tokens=20, ignore_eos=True)
    again = running.complete(prompt(11, 1000), max_tokens=20, ignore_eos=True)
    after = read(f"{running.url}/metrics")

    def grew(name: str) -> float:
        return after[f"penstock_{name}"] - before[f"penstock_{name}"]

    assert grew("prompt_tokens_total") == 2000
    assert grew("generation_tokens_total") == 40
    assert grew("worker_decode_generated_tokens_total") >= 40
    cached = answer.cached_tokens + again.cached_tokens
    assert grew("prompt_tokens_cached_total") == cached
    assert grew("worker_prefill_cached_tokens_total") == cached
    missed, computed = (
        grew("worker_prefill_missed_tokens_total"),
        grew("worker_prefill_computed_tokens_total"),
    )
    assert missed == computed == 2000 - cached
    assert grew("request_params_n_sum") == 2
    assert grew("request_success_total") == grew("e2e_request_latency_seconds_count") == 2


def test_one_front_alone_and_a_port_of_its_own(running: Cluster) -> None:
    alone = read(f"{running.url}/metrics?scope=front")
    assert "penstock_requests_running" in alone
    assert not any(name.startswith(("penstock_worker_", "penstock_store_")) for name in alone)
    assert running.client.get("/metrics?scope=mine").status_code == 400
    # All processes were told the same port: one has it, and the others serve without.
    own = httpx.get(f"http://127.0.0.1:{running.config.telemetry.metrics_port}/metrics").text
    assert own.startswith("# HELP penstock_")


def test_what_a_killed_prefill_worker_and_a_lost_store_cost_is_told() -> None:
    flags: dict[str, Any] = {}
    if importlib.util.find_spec("opentelemetry.exporter") is not None:
        # A collector that nobody listens at is lost from the beginning.
        flags["telemetry__otlp_endpoint"] = "http://127.0.0.1:9"
    speed, chunk, long = 6000.0, 512, prompt(1, 6000)
    with cluster(
        "fake", model__fake_prefill_tokens_per_s=speed, prefill__chunk_tokens=chunk, **flags
    ) as c:
        restarting = threading.Thread(target=_restart_what_dies, args=(c,), daemon=True)
        restarting.start()
        launcher: Any = c.launcher
        body = {"model": "fake", "prompt": long, "max_tokens": 2}
        with ThreadPoolExecutor(1) as pool:
            lost = pool.submit(c.client.post, "/v1/completions", json=body)
            time.sleep(0.6)
            launcher.workers["prefill-0"].kill()
            answer = lost.result()
        assert answer.status_code == 200, answer.text
        usage = answer.json()["usage"]
        # What its successor found was computed for this very request: nothing of it was cached.
        assert usage["prompt_tokens_details"]["cached_tokens"] == 0
        text = c.client.get("/metrics").text
        told = read(f"{c.url}/metrics")
        # The new worker counts from 0, so these are the second try's own figures.
        rest = told["penstock_worker_prefill_computed_tokens_total"]
        assert 0 < rest <= len(long) - 2 * chunk
        # A chunk's blocks may have been committed when its state was not yet.
        assert told["penstock_worker_prefill_recomputed_tokens_total"] <= chunk
        assert told["penstock_prefill_failovers_total"] >= 1
        assert told["penstock_prefill_failover_lost_tokens_total"] == 0
        print(f"killed after 0.6 s: the next one computed {rest:.0f} of {len(long)} tokens")

        launcher.store.kill()
        text = c.client.get("/metrics").text
    assert 'penstock_requests_total{endpoint="completions",outcome="length"} 1.0' in text
    assert "penstock_store_objects" not in text
    failures = next(x for x in text.splitlines() if x.startswith("penstock_scrape_failures_total"))
    assert "penstock_workers_unreachable 1.0" in text or not failures.endswith(" 0.0")


def _restart_what_dies(c: Cluster) -> None:
    with contextlib.suppress(UnavailableError):
        c.launcher.wait()
