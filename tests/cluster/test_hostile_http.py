"""A front under clients that mean harm: slow heads, slow bodies, unread answers, bombs of headers,
of depth, of digits, of zeros. Each ends within its limit, and others are served meanwhile.
"""

from __future__ import annotations

import gzip
import json
import select
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.breakage import assert_idle, fake_answer, prompt_of
from tests.cluster.harness import Cluster, cluster

HEAD_S, BODY_S, STALL_S = 1.0, 1.5, 1.5
HEAD_BYTES, BODY_BYTES, BODIES_BYTES, CONNECTIONS = 8192, 200_000, 400_000, 40
LATE_S = 4.0
"""How much later than its limit something may end on a busy machine."""


@pytest.fixture(scope="module")
def front() -> Iterator[Cluster]:
    with cluster(
        "fake",
        front__header_timeout_s=HEAD_S,
        front__max_header_bytes=HEAD_BYTES,
        front__body_timeout_s=BODY_S,
        front__max_body_bytes=BODY_BYTES,
        front__max_bodies_bytes=BODIES_BYTES,
        front__max_connections=CONNECTIONS,
        front__write_stall_s=STALL_S,
    ) as running:
        yield running


def dial(running: Cluster) -> socket.socket:
    host, port = running.url.removeprefix("http://").split(":")
    wire = socket.create_connection((host, int(port)), 10)
    wire.settimeout(20)
    return wire


def rest_of(wire: socket.socket) -> bytes:
    """All that comes until the other side hangs up."""
    got = b""
    while True:
        try:
            some = wire.recv(65536)
        except (ConnectionResetError, BrokenPipeError):
            return got
        if not some:
            return got
        got += some


def code_of(raw: bytes) -> tuple[int, str]:
    """Status and error code of one whole response."""
    head, _, content = raw.partition(b"\r\n\r\n")
    status = int(head.split()[1])
    error = json.loads(content)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return status, str(error["code"])


def serves(running: Cluster, seed: int = 1) -> None:
    prompt = prompt_of(300, seed)
    answer = running.complete(prompt, max_tokens=4, ignore_eos=True)
    assert answer.token_ids == fake_answer(prompt, 4)


def head_of(path: str, size_bytes: int, **more: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "host: x", f"content-length: {size_bytes}"]
    lines += ["content-type: application/json", *(f"{k}: {v}" for k, v in more.items())]
    return "\r\n".join([*lines, "", ""]).encode()


def test_a_connection_that_says_nothing_is_hung_up_on(front: Cluster) -> None:
    with dial(front) as wire:
        started = time.monotonic()
        assert rest_of(wire) == b""
        took = time.monotonic() - started
    print(f"silent for {took:.2f} s")
    assert HEAD_S * 0.8 < took < HEAD_S + LATE_S


@pytest.mark.parametrize("drip", [b"X-A: b\r\n", b"a", b"\r\n"])
def test_headers_that_drip_end_in_408(front: Cluster, drip: bytes) -> None:
    with dial(front) as wire:
        started = time.monotonic()
        if drip != b"\r\n":
            wire.sendall(b"GET /health HTTP/1.1\r\nX-Start: ")
        wire.settimeout(0.1)
        got = b""
        while time.monotonic() - started < HEAD_S + LATE_S:
            try:
                wire.sendall(drip)
                got = wire.recv(65536)
                break
            except TimeoutError:
                continue
            except (ConnectionResetError, BrokenPipeError):
                break
        took = time.monotonic() - started
    print(f"{took:.2f} s: {got[:200]!r}")
    assert took < HEAD_S + LATE_S
    if got:
        assert code_of(got) == (408, "request_timeout")


def test_a_dripping_second_request_on_a_kept_connection_ends_too(front: Cluster) -> None:
    with dial(front) as wire:
        wire.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        assert wire.recv(65536).startswith(b"HTTP/1.1 200")
        started = time.monotonic()
        wire.sendall(b"GET /hea")
        assert code_of(rest_of(wire)) == (408, "request_timeout")
        assert time.monotonic() - started < HEAD_S + LATE_S


def test_a_pause_between_two_whole_requests_is_no_offence(front: Cluster) -> None:
    with dial(front) as wire:
        for pause_s in (0.0, HEAD_S * 1.5):
            time.sleep(pause_s)
            wire.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
            got = b""
            while b'"ok"' not in got:
                got += wire.recv(65536)
            assert got.startswith(b"HTTP/1.1 200")


def test_a_body_that_drips_ends_in_408(front: Cluster) -> None:
    with dial(front) as wire:
        started = time.monotonic()
        wire.sendall(head_of("/v1/completions", 100_000))
        wire.settimeout(0.1)
        got = b""
        while time.monotonic() - started < BODY_S + LATE_S and not got:
            try:
                wire.sendall(b" ")
                got = wire.recv(65536)
            except TimeoutError:
                continue
        took = time.monotonic() - started
        print(f"{took:.2f} s: {got[:300]!r}")
        wire.settimeout(10)
        while b"request_timeout" not in got:
            some = wire.recv(65536)
            assert some, got
            got += some
        assert b"408" in got[:20]
        assert took > BODY_S * 0.8
        # Answered, and still it drips: the connection is not kept for that.
        ends = time.monotonic() + HEAD_S + LATE_S
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            while time.monotonic() < ends:
                wire.sendall(b" ")
                time.sleep(0.05)


def test_a_large_body_that_keeps_coming_may_take_longer(front: Cluster) -> None:
    body = json.dumps({"model": "fake", "prompt": "x", "max_tokens": 1}).encode()
    body += b" " * (150_000 - len(body))
    with dial(front) as wire:
        started = time.monotonic()
        wire.sendall(head_of("/v1/completions", len(body)))
        for at in range(0, len(body), 15_000):
            wire.sendall(body[at : at + 15_000])
            time.sleep(BODY_S / 8)
        took = time.monotonic() - started
        got = wire.recv(65536)
    print(f"{len(body)} bytes in {took:.2f} s, limit {BODY_S} s and more for what came")
    assert took > BODY_S and got.startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    "lines",
    [
        b"X-Large: " + b"a" * HEAD_BYTES + b"\r\n",
        b"".join(b"X-%d: a\r\n" % i for i in range(2000)),
        b"X-Endless: " + b"a" * 4_000_000,
    ],
    ids=["one large", "many small", "one endless"],
)
def test_a_bomb_of_headers_ends_in_431(front: Cluster, lines: bytes) -> None:
    with dial(front) as wire:
        try:
            wire.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n" + lines + b"\r\n")
        except (ConnectionResetError, BrokenPipeError):
            print("hung up on while sending")
        got = rest_of(wire)
    print(len(lines), got[:200])
    # What was still being sent may turn the answer into a reset on its way.
    assert not got or code_of(got) == (431, "headers_too_large")


def test_a_long_url_ends_in_431_and_a_head_within_the_limit_does_not(front: Cluster) -> None:
    for size_bytes, expected in ((HEAD_BYTES + 100, 431), (HEAD_BYTES - 500, 404)):
        with dial(front) as wire:
            wire.sendall(b"GET /" + b"a" * size_bytes + b" HTTP/1.1\r\nhost: x\r\n\r\n")
            assert int(wire.recv(65536).split()[1]) == expected


def test_bytes_that_are_no_http_are_told_so(front: Cluster) -> None:
    for raw in (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"GET\r\n\r\n", b"\0" * 50):
        with dial(front) as wire:
            wire.sendall(raw + b"\r\n\r\n")
            got = rest_of(wire)
        assert not got or code_of(got) == (400, "invalid_http")


def test_smuggled_lengths_are_refused(front: Cluster) -> None:
    tries = [
        b"Content-Length: 5\r\nContent-Length: 6\r\n",
        b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n",
        b"Content-Length: -1\r\n",
        b"Content-Length: 99999999999999999999999999\r\n",
        b"Transfer-Encoding: chunked, identity\r\n",
    ]
    for lines in tries:
        with dial(front) as wire:
            wire.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n" + lines + b"\r\nabcde")
            status = int(rest_of(wire).split()[1])
        print(lines, status)
        assert status in (400, 408, 413)


def test_an_answer_that_nobody_reads_ends_and_frees_its_request(front: Cluster) -> None:
    body = json.dumps(
        {"model": "fake", "prompt": [5], "max_tokens": 60_000, "ignore_eos": True, "stream": True}
        | {"logits_digest": True}
    ).encode()
    host, port = front.url.removeprefix("http://").split(":")
    wire = socket.socket()
    # Small windows, so that little fits between the two ends.
    wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    wire.settimeout(20)
    with wire:
        wire.connect((host, int(port)))
        wire.sendall(head_of("/v1/completions", len(body)) + body)
        assert wire.recv(15).startswith(b"HTTP/1.1 200")
        took = assert_idle(front, within_s=30)
    print(f"idle {took:.1f} s after the reader stopped")
    serves(front, 7)


@pytest.mark.parametrize("depth", [500, 3000, 60_000])
@pytest.mark.parametrize("place", ["prompt", "metadata", "logit_bias"])
def test_deep_json_is_refused(front: Cluster, depth: int, place: str) -> None:
    deep = "[" * depth + "]" * depth
    raw = f'{{"model":"fake","prompt":"x","{place}":{deep}}}'
    if place == "logit_bias":
        raw = raw.replace("[", '{"a":').replace(":]", ":1}").replace("]", "}")
    answer = front.client.post("/v1/completions", content=raw[: BODY_BYTES - 1])
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "invalid_json"


@pytest.mark.parametrize(
    "digits", ["9" * 40, "9" * 5_000, "1e400", "-" + "9" * 40, "1" + "0" * 308]
)
@pytest.mark.parametrize("field", ["max_tokens", "seed", "temperature", "top_k", "prompt", "n"])
def test_huge_numbers_are_refused_by_name(front: Cluster, field: str, digits: str) -> None:
    value = f"[{digits}]" if field == "prompt" else digits
    fields = {"model": '"fake"', "prompt": '"x"', field: value}
    raw = "{" + ",".join(f'"{name}":{text}' for name, text in fields.items()) + "}"
    answer = front.client.post("/v1/completions", content=raw)
    assert answer.status_code == 400, (field, digits[:10], answer.text)
    error = answer.json()["error"]
    assert len(error["message"]) < 500
    assert error["code"] == "invalid_json" or field in str(error["param"])


def test_nothing_unpacks_so_a_zip_bomb_stays_small(front: Cluster) -> None:
    bomb = gzip.compress(b" " * 50_000_000)
    print(f"{len(bomb)} bytes that would be 50,000,000")
    for encoding in ("gzip", "GZIP", "deflate", "br", "zstd", "gzip, identity"):
        answer = front.client.post(
            "/v1/completions", content=bomb, headers={"content-encoding": encoding}
        )
        assert answer.status_code == 415
        assert answer.json()["error"]["code"] == "unsupported_content_encoding"
    good = {"model": "fake", "prompt": "x", "max_tokens": 1}
    headers = {"content-encoding": "identity"}
    assert front.client.post("/v1/completions", json=good, headers=headers).status_code == 200


def test_bodies_together_stay_within_their_memory(front: Cluster) -> None:
    """Half-sent bodies hold memory; one too many is asked to come back, and later gets in."""
    body = json.dumps({"model": "fake", "prompt": "x", "max_tokens": 1}).encode()
    holders = [dial(front) for _ in range(3)]
    try:
        for wire in holders:
            wire.sendall(head_of("/v1/completions", 190_000) + b" " * 120_000)
        time.sleep(0.3)
        answer = front.client.post("/v1/completions", content=body + b" " * 100_000)
        print(answer.status_code, answer.text)
        assert answer.status_code == 429 and "max_bodies_bytes" in answer.text
        assert answer.headers["retry-after"]
    finally:
        for wire in holders:
            wire.close()
    deadline = time.monotonic() + 10
    while front.client.post("/v1/completions", content=body + b" " * 100_000).status_code != 200:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_more_connections_than_allowed_are_turned_away_and_the_rest_served(front: Cluster) -> None:
    serves(front, 3)
    many = [dial(front) for _ in range(CONNECTIONS + 20)]
    time.sleep(0.3)
    answered, _, _ = select.select(many, [], [], 0)
    told = [code_of(rest_of(wire)) for wire in answered]
    print(f"{len(told)} of {len(many)} turned away")
    assert set(told) == {(503, "too_many_connections")}
    # The harness keeps a connection or two open as well.
    assert 20 <= len(told) <= 25
    for wire in many:
        wire.close()
    time.sleep(0.3)
    serves(front, 4)


def test_a_hundred_slow_clients_do_not_slow_a_fast_one(front: Cluster) -> None:
    slow = [dial(front) for _ in range(CONNECTIONS - 10)]
    for wire in slow:
        wire.sendall(b"GET /health HTTP/1.1\r\nX-Start: ")
    started = time.monotonic()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda seed: serves(front, seed), range(10, 18)))
    took = time.monotonic() - started
    print(f"8 answers in {took:.2f} s beside {len(slow)} slow connections")
    for wire in slow:
        wire.close()
    assert took < 10


def _rss_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmRSS")


def test_memory_stays_flat_under_a_flood_of_refused_requests(front: Cluster) -> None:
    launcher: Any = front.launcher
    pid = launcher.front.pid
    bad = [b"[" * 9_000, b"9" * 100_000, b'{"prompt": "' + b"x" * 150_000, b"\xff" * 50_000]

    def flood(rounds: int) -> None:
        for i in range(rounds):
            answer = front.client.post("/v1/completions", content=bad[i % len(bad)])
            assert answer.status_code == 400

    flood(100)
    before = _rss_bytes(pid)
    flood(400)
    after = _rss_bytes(pid)
    print(f"front: {before >> 20} MiB, after 400 more refusals {after >> 20} MiB")
    assert after - before < 32 << 20
    assert_idle(front)
