"""Replicas rise with streams and fall without, under Ray Serve's own controller; nobody notices."""

from __future__ import annotations

import httpx
import pytest

from tests.cluster.breakage import Stream, fake_answer, prompt_of, serving, wait_for

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SCALED = {
    "PENSTOCK_MODEL__FAKE_DECODE_STEP_MS": "50",
    "PENSTOCK_DECODE__MAX_RUNNING": "4",
    "PENSTOCK_DECODE__AUTOSCALING__ENABLED": "true",
    "PENSTOCK_DECODE__AUTOSCALING__MAX_REPLICAS": "2",
    "PENSTOCK_DECODE__AUTOSCALING__USE": "0.5",
    "PENSTOCK_DECODE__AUTOSCALING__DOWN_HOLD_S": "2",
    "PENSTOCK_DECODE__AUTOSCALING__DOWN_PAUSE_S": "1",
}


def decode_workers(url: str) -> int:
    for line in httpx.get(f"{url}/metrics").text.splitlines():
        if line.startswith('penstock_workers{role="decode",state="ready"}'):
            return int(float(line.split()[-1]))
    return 0


def test_decode_replicas_rise_and_fall_and_every_stream_is_whole() -> None:
    tokens = 200
    with serving("--launcher", "ray", **SCALED) as served:
        assert decode_workers(served.url) == 1
        prompts = [prompt_of(300, seed) for seed in range(4)]
        with httpx.Client(base_url=served.url) as client:
            streams = [Stream(client, prompt, max_tokens=tokens) for prompt in prompts]
            rose_s = wait_for("a second one", lambda: decode_workers(served.url) == 2, within_s=40)
            results = [stream.end(within_s=60) for stream in streams]
        fell_s = wait_for("one again", lambda: decode_workers(served.url) == 1, within_s=40)
        print(f"rose after {rose_s:.1f} s, fell {fell_s:.1f} s after the last stream's end")
        for prompt, result in zip(prompts, results, strict=True):
            assert result.done and not (result.error or result.broken)
            assert tuple(result.token_ids) == fake_answer(prompt, tokens)
