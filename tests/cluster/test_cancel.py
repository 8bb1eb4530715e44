"""A client that hangs up frees everything within 2 s, wherever its request stands."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

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


@dataclass(frozen=True)
class HangUp:
    """Where one client goes away."""

    sent: float
    """The part of its request that it sends."""
    events: int | None
    """Lines of the answer that it reads; None: it reads nothing and waits `after_s`."""
    after_s: float
    length: int
    seed: int
    fields: dict[str, Any]

    def act(self, url: str) -> None:
        where = httpx.URL(url)
        body = json.dumps(body_of(prompt_of(self.length, self.seed), **self.fields)).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: {where.host}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        whole = head.encode() + body
        with socket.create_connection((where.host, where.port or 80), timeout=5) as client:
            client.sendall(whole[: int(len(whole) * self.sent)])
            if self.sent < 1.0 or self.events is None:
                time.sleep(self.after_s)
                return
            client.settimeout(2.0)
            seen = b""
            with contextlib.suppress(TimeoutError):
                while seen.count(b"\n\n") <= self.events and (piece := client.recv(4096)):
                    seen += piece


@st.composite
def hang_ups(draw: st.DrawFn) -> list[HangUp]:
    """One to three clients at once, each of which goes away somewhere."""
    return draw(
        st.lists(
            st.builds(
                HangUp,
                sent=st.one_of(st.just(1.0), st.floats(0.0, 0.99)),
                events=st.one_of(st.none(), st.integers(0, 25)),
                after_s=st.floats(0.0, 0.6),
                length=st.sampled_from([3, 300, 900, 5000]),
                # Two of them may have the same prompt: one waits for the other.
                seed=st.sampled_from([70, 71]),
                fields=st.fixed_dictionaries(
                    {
                        "max_tokens": st.integers(1, 60),
                        "stream": st.booleans(),
                        "n": st.sampled_from([1, 3]),
                        "priority": st.sampled_from(["interactive", "normal", "batch"]),
                        "evidence": st.booleans(),
                    }
                ),
            ),
            min_size=1,
            max_size=3,
        )
    )


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(clients=hang_ups())
def test_hanging_up_at_any_moment_frees_everything(slow: Cluster, clients: list[HangUp]) -> None:
    """hypothesis picks the moments: in the request's head or body, in line, while the prompt is
    read, waited for or handed over, and at any token.
    """
    acting = [threading.Thread(target=client.act, args=(slow.url,)) for client in clients]
    for thread in acting:
        thread.start()
    for thread in acting:
        thread.join(20)
        assert not thread.is_alive()
    _assert_freed(slow, f"{len(clients)} clients gone")


def test_an_answer_after_all_that_is_right(slow: Cluster) -> None:
    prompt = prompt_of(900, 70)
    answer = slow.complete(prompt, max_tokens=8, ignore_eos=True)
    assert answer.token_ids == fake_answer(prompt, 8)
