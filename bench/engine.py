"""`penstock bench engine`: a model's speed through a local cluster of one prefill and one decode
worker, one request at a time, beside a plain torch matmul in the same run.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Sequence

import httpx

from bench import evidence, restore
from bench.client import Answer, Client
from bench.drafts import acceptance, read_counts
from bench.prompts import prompt
from bench.report import Report, Row
from bench.stats import finite, low_median_high, median, ratio, spread
from cluster.config import ClusterConfig
from penstock.errors import PenstockError

_PROBE_CHARS = 2_000
_SHOWS_NOT = (
    "the engine alone: prefill includes encoding, the store, hand-over and one drawn token",
    "batches: one request at a time",
    "a GPU's speed: the matmul beside it ran on the CPU in float32",
)


def run(
    config: ClusterConfig, *, lengths: Sequence[int], tokens: int, repeats: int, seed: int
) -> Report:
    from cluster.launch import started

    began_s = time.monotonic()
    threads = config.model.torch_threads
    gflop_s = [_matmul(threads)]
    with started(config) as endpoint:
        startup_s = time.monotonic() - began_s
        rows, with_evidence, restored = asyncio.run(
            _measure(endpoint.url, lengths=lengths, tokens=tokens, repeats=repeats, seed=seed)
        )
        bytes_per_token = _kv_bytes(endpoint.url)
        drafts = acceptance({}, read_counts(endpoint.url, settle=True))
    gflop_s.append(_matmul(threads))
    best = max(gflop_s)
    figures: list[Row] = [
        {
            **row,
            "kv_bytes_per_token": bytes_per_token,
            "matmul_gflop_s": best,
            "matmul_gflop_per_prefill_token": ratio(best, row["prefill_tokens_per_s"]),
            "matmul_gflop_per_decode_token": finite(best * row["decode_ms_per_token_p50"] / 1e3),
        }
        for row in rows
    ]
    return Report(
        bench="engine",
        settings={
            "model": config.model.model,
            "numerics": config.model.numerics,
            "kv_cache_dtype": config.model.kv_cache_dtype,
            "num_speculative_tokens": config.model.num_speculative_tokens,
            "device": config.model.device,
            "torch_threads": threads,
            "chunk_tokens": config.prefill.chunk_tokens,
            "launcher": config.launcher.kind,
            "seed": seed,
            "startup_s": startup_s,
            "matmul_gflop_s_before_and_after": gflop_s,
        },
        tables={
            "one request at a time": figures,
            "restore": [restored],
            "evidence": [with_evidence],
        }
        | ({"drafts": drafts} if drafts else {}),
        shows_not=_SHOWS_NOT,
        wall_s=time.monotonic() - began_s,
    )


async def _measure(
    url: str, *, lengths: Sequence[int], tokens: int, repeats: int, seed: int
) -> tuple[list[Row], Row, Row]:
    """Rows by length; the first length with and without evidence; a long prefix restored."""
    async with Client(url, timeout_s=1800.0) as client:
        probe = await client.chat(
            prompt(_PROBE_CHARS, seed=seed), max_tokens=tokens, ignore_eos=True
        )
        chars_per_token = _PROBE_CHARS / probe.prompt_tokens
        rows = []
        for place, length in enumerate(lengths):
            answers = []
            for number in range(repeats):
                text = prompt(
                    int(length * chars_per_token), seed=seed + 1 + place * repeats + number
                )
                answers.append(await client.chat(text, max_tokens=tokens, ignore_eos=True))
            rows.append(speed_row(answers))
        restored = await restore.measure(
            client,
            chars=int(restore.TOKENS * chars_per_token),
            repeats=repeats,
            seed=seed + 1 + len(lengths) * repeats,
        )
        chars = int(lengths[0] * chars_per_token)
        shown = await evidence.measure(client, chars=chars, pairs=4 * repeats, seed=seed)
        return rows, shown, restored


def speed_row(answers: Sequence[Answer]) -> Row:
    """Prefill from the wait for the first token, decode from all that follow it. Pure."""
    computed = [a.prompt_tokens - a.cached_tokens for a in answers]
    rest = [(a.ended_s - a.event_times_s[0]) / max(1, a.completion_tokens - 1) for a in answers]
    low_s, ttft_s, high_s = low_median_high(a.ttft_s for a in answers)
    return {
        "prompt_tokens": int(median([a.prompt_tokens for a in answers])),
        "n": len(answers),
        "cached_tokens": int(median([a.cached_tokens for a in answers])),
        "ttft_s": finite(ttft_s),
        "ttft_s_low": finite(low_s),
        "ttft_s_high": finite(high_s),
        "prefill_tokens_per_s": finite(
            median([c / a.ttft_s for c, a in zip(computed, answers, strict=True)])
        ),
        "decoded_tokens": int(median([a.completion_tokens for a in answers])),
        **spread(rest, "decode_ms_per_token", scale=1e3),
    }


def _kv_bytes(url: str) -> float | None:
    """The decode worker's own figure, from `/metrics`."""
    for line in httpx.get(f"{url}/metrics", timeout=30, trust_env=False).text.splitlines():
        name, _, value = line.rpartition(" ")
        if line[:1] != "#" and name.partition("{")[0].endswith("kv_bytes_per_token"):
            return float(value)
    return None


def _matmul(threads: int) -> float:
    done = subprocess.run(
        [sys.executable, "-m", "bench.matmul", str(threads)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if done.returncode:
        words = done.stderr.strip().splitlines()
        raise PenstockError(f"the matmul failed: {words[-1] if words else done.returncode}")
    return float(done.stdout)
