"""A client that hangs up frees everything within 2 s, wherever its request stands."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.cluster.breakage import (
    assert_idle,
    body_of,
    fake_answer,
    front_metric,
    prompt_of,
    raw_request,
    wait_for,
)
from tests.cluster.harness import Cluster, cluster

FREED_WITHIN_S = 2.0
# The workers' gauges reach the directory with their heartbeat.
HEARTBEAT_S = 1.0


@pytest.fixture(scope="module")
def slow() -> Iterator[Cluster]:
    """Prefill of 2,000 tokens a second, 20 ms a token, one answer at a time."""
    with cluster(
        "fake",
        model__fake_prefill_tokens_per_s=2000,
        model__fake_decode_step_ms=20,
        prefill__chunk_tokens=256,
        decode__max_running=1,
    ) as running:
        yield running


def _gauge(cluster: Cluster, role: str, name: str, at_least: float) -> None:
    wait_for(
        f"{role} {name} >= {at_least}",
        lambda: cluster.counter(role, name) >= at_least,
        within_s=10,
    )


def _assert_freed(cluster: Cluster, what: str) -> None:
    started = time.monotonic()
    assert_idle(cluster, within_s=FREED_WITHIN_S + HEARTBEAT_S)
    print(f"{what}: everything free {time.monotonic() - started:.2f} s after the client hung up")


@pytest.mark.parametrize("stream", [True, False], ids=["streaming", "whole"])
def test_hanging_up_while_prefilling_frees_everything(slow: Cluster, stream: bool) -> None:
    prompt = prompt_of(20_000, 10 + stream)
    before = slow.counter("prefill", "prefill_computed_tokens_total")
    with raw_request(slow.url, body_of(prompt, max_tokens=4, stream=stream)):
        _gauge(slow, "prefill", "reserved_bytes", 1)
        time.sleep(0.5)
    _assert_freed(slow, f"prefilling, stream={stream}")
    assert slow.counter("prefill", "prefill_computed_tokens_total") - before < len(prompt)


@pytest.mark.parametrize("stream", [True, False], ids=["streaming", "whole"])
def test_hanging_up_while_decoding_frees_everything(slow: Cluster, stream: bool) -> None:
    before = slow.counter("decode", "decode_generated_tokens_total")
    body = body_of(prompt_of(700, 20 + stream), max_tokens=3000, stream=stream)
    with raw_request(slow.url, body):
        _gauge(slow, "decode", "decode_generated_tokens_total", before + 20)
    _assert_freed(slow, f"decoding, stream={stream}")
    generated = slow.counter("decode", "decode_generated_tokens_total") - before
    print(f"{generated:.0f} of 3000 tokens had been generated")
    assert generated < 1000


@pytest.mark.parametrize("stream", [True, False], ids=["streaming", "whole"])
def test_hanging_up_while_queued_for_admission_frees_everything(
    slow: Cluster, stream: bool
) -> None:
    first = body_of(prompt_of(300, 30 + stream), max_tokens=3000, stream=True)
    second = body_of(prompt_of(300, 40 + stream), max_tokens=5, stream=stream)
    with raw_request(slow.url, first):
        _gauge(slow, "decode", "running", 1)
        with raw_request(slow.url, second):
            _gauge(slow, "decode", "queued", 1)
        wait_for(
            "the queue is empty, the other request still runs",
            lambda: (
                slow.counter("decode", "queued") == 0
                and front_metric(slow.client, "penstock_requests_running") == 1
            ),
            within_s=FREED_WITHIN_S + HEARTBEAT_S,
        )
        assert slow.counter("decode", "running") == 1
    _assert_freed(slow, f"queued, stream={stream}")


def test_forty_hang_ups_at_random_moments_leave_nothing_and_spoil_nothing(slow: Cluster) -> None:
    for number in range(40):
        fields: dict[str, Any] = {"max_tokens": 50, "stream": bool(number % 2)}
        with raw_request(slow.url, body_of(prompt_of(100 + 60 * number, 50 + number), **fields)):
            time.sleep(0.01 * (number % 13))
    _assert_freed(slow, "forty hang-ups")
    prompt = prompt_of(900, 60)
    answer = slow.complete(prompt, max_tokens=8, ignore_eos=True)
    expected = fake_answer(prompt, 8)
    print(f"tokens of a request afterwards: {answer.token_ids}, expected {expected}")
    assert answer.token_ids == expected
