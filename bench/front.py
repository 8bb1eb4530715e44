"""`penstock bench front`: what a streamed token costs on its way out, by what stands before it.

The same streams of the fake model through uvicorn alone (launcher `local`) and through Ray Serve's
proxy. Ray Serve's HAProxy cannot be measured here: see docs/adr/0002-proxy-and-coalescing.md.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace

from bench import startup
from bench.front_case import PARTS, FrontCase, Result, Sample
from bench.report import Report, Row
from bench.stats import finite, median, ratio, spread
from penstock.errors import PenstockError, UnavailableError

_CASE_TIMEOUT_S = 240.0
_SHOWS_NOT = (
    "a loaded front on a machine of its own: client, front, proxy and workers share these cores",
    "throughput limits: with many streams the client may be the slowest part",
    "TLS, other clients' read sizes, or tokens of more than one byte of text",
)
_WAYS = (
    FrontCase("uvicorn (local)", "local", 0.0, 16, 0, 0, {}),
    FrontCase("Serve proxy (ray)", "ray", 0.0, 16, 0, 0, {}),
)


def cases(
    *, streams: int, tokens: int, repeats: int, step_ms: float
) -> list[tuple[str, FrontCase]]:
    """(load, case): a paced stream and one as fast as it goes, each way out."""
    loads = {f"paced, {step_ms:g} ms a step": step_ms, "as fast as it goes": 0.0}
    return [
        (load, replace(way, decode_step_ms=step, streams=streams, tokens=tokens, repeats=repeats))
        for load, step in loads.items()
        for way in _WAYS
    ]


def run(*, streams: int, tokens: int, repeats: int, step_ms: float) -> Report:
    began_s = time.monotonic()
    plan = cases(streams=streams, tokens=tokens, repeats=repeats, step_ms=step_ms)
    tables: dict[str, list[Row]] = {}
    starts: list[Row] = []
    exposed: dict[str, list[str]] = {}
    for load, case in plan:
        result = run_case(case)
        rows = tables.setdefault(f"{streams} streams, {load}; CPU per 1,000 tokens", [])
        rows.append(way_row(case.name, result.samples, rows[0] if rows else None))
        starts.append({"way": case.name, "n": 1, "startup_s": result.startup_s})
        exposed[case.name] = result.exposed
    return Report(
        bench="front",
        settings={
            "streams": streams,
            "tokens_a_stream": tokens,
            "repeats": repeats,
            "fake_decode_step_ms": step_ms,
            "listening_beyond_loopback": exposed,
        },
        tables={**tables, "start of a cluster": starts, "command line": startup.rows()},
        shows_not=_SHOWS_NOT,
        wall_s=time.monotonic() - began_s,
    )


def run_case(case: FrontCase) -> Result:
    """In a process of its own. Raises PenstockError with its last words if it fails."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "bench.front_case"],
            input=json.dumps(asdict(case)) + "\n",
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_CASE_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise UnavailableError(f"'{case.name}' took more than {_CASE_TIMEOUT_S:.0f} s") from error
    if done.returncode:
        words = [line for line in done.stderr.splitlines() if line.strip()]
        raise PenstockError(f"'{case.name}' failed: {words[-1] if words else done.returncode}")
    data = json.loads(done.stdout.splitlines()[-1])
    return Result(data["startup_s"], [Sample(**s) for s in data["samples"]], data["exposed"])


def way_row(name: str, samples: Sequence[Sample], first: Row | None) -> Row:
    """Medians over the rounds; `ratio` compares the whole way out with the first way's. Pure."""

    def per_1000(part: str) -> float:
        return median([s.cpu_s.get(part, 0.0) * 1e6 / s.tokens for s in samples])

    cpu = {f"{part}_cpu_ms": finite(per_1000(part)) for part in PARTS}
    out = median([(s.cpu_s["front"] + s.cpu_s["proxy"]) * 1e6 / s.tokens for s in samples])
    return {
        "way": name,
        "n": len(samples),
        "tokens_per_s": finite(median([s.tokens / s.wall_s for s in samples])),
        "tokens_per_event": finite(median([s.tokens / s.events for s in samples])),
        **cpu,
        "way_out_cpu_ms": finite(out),
        "ratio": 1.0 if first is None else ratio(out, first["way_out_cpu_ms"]),
        "client_cpu_ms": finite(median([s.client_cpu_s * 1e6 / s.tokens for s in samples])),
        **spread([gap for s in samples for gap in s.gaps_s], "gap_ms", scale=1e3),
        "ttft_ms_p50": finite(median([t for s in samples for t in s.ttft_s]) * 1e3),
    }
