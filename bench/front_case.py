"""One way out for tokens, in a process of its own: Ray reads its environment when it is imported.

`python -m bench.front_case`: a `FrontCase` as JSON in the first line of stdin, its result as JSON
in the last line of stdout.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.client import Answer, Client
from bench.procs import cpu_by, part_of
from bench.prompts import prompt
from bench.stats import gaps

_LISTEN = "0A"
PARTS = ("front", "proxy", "decode", "rest")


@dataclass(frozen=True)
class FrontCase:
    """`decode_step_ms` 0: tokens come as fast as the fake makes them."""

    name: str
    launcher: str
    decode_step_ms: float
    streams: int
    tokens: int
    repeats: int
    env: Mapping[str, str]


@dataclass(frozen=True)
class Sample:
    """One round: all streams side by side, from the first request to the last answer's end."""

    tokens: int
    events: int
    wall_s: float
    cpu_s: Mapping[str, float]
    client_cpu_s: float
    gaps_s: list[float]
    ttft_s: list[float]


@dataclass(frozen=True)
class Result:
    startup_s: float
    samples: list[Sample]
    exposed: list[str]
    """TCP ports of this machine that listen on more than loopback, other programs' included."""


def measure(case: FrontCase) -> Result:
    from cluster.config import resolve
    from cluster.launch import started
    from cluster.launchers.common import free_port

    flags = {
        "model.model": "fake",
        "model.fake_decode_step_ms": case.decode_step_ms,
        "launcher.kind": case.launcher,
        "front.port": free_port(),
        "decode.max_running": case.streams,
    }
    began_s = time.monotonic()
    with started(resolve(flags).config) as endpoint:
        startup_s = time.monotonic() - began_s
        samples = asyncio.run(_rounds(case, endpoint.url))
        exposed = exposed_ports()
    return Result(startup_s, samples, exposed)


async def _rounds(case: FrontCase, url: str) -> list[Sample]:
    async with Client(url, model="fake") as client:
        await _round(client, case.streams, 8)
        return [await _round(client, case.streams, case.tokens) for _ in range(case.repeats)]


async def _round(client: Client, streams: int, tokens: int) -> Sample:
    before, own = cpu_by(part_of), time.process_time()
    began_s = time.monotonic()
    answers: list[Answer] = await asyncio.gather(
        *(
            client.chat(prompt(64, seed=seed), max_tokens=tokens, ignore_eos=True)
            for seed in range(streams)
        )
    )
    wall_s = time.monotonic() - began_s
    after, own = cpu_by(part_of), time.process_time() - own
    spent = {part: after.get(part, 0.0) - before.get(part, 0.0) for part in after}
    known = {part: spent.pop(part, 0.0) for part in PARTS if part != "rest"}
    return Sample(
        tokens=sum(a.completion_tokens for a in answers),
        events=sum(len(a.event_times_s) for a in answers),
        wall_s=wall_s,
        cpu_s=known | {"rest": sum(spent.values())},
        client_cpu_s=own,
        gaps_s=[gap for a in answers for gap in gaps(a.event_times_s)],
        ttft_s=[a.ttft_s for a in answers],
    )


def is_loopback(address: str) -> bool:
    """Of an address as /proc/net/tcp and tcp6 write it: hexadecimal words in host order."""
    v4 = address.removeprefix("0000000000000000FFFF0000")
    return (len(v4) == 8 and v4.endswith("7F")) or address == "0" * 24 + "01000000"


def exposed_ports() -> list[str]:
    """Listening TCP ports in this network namespace, whoever owns them, beyond loopback."""
    found = set()
    for name in ("tcp", "tcp6"):
        try:
            lines = Path(f"/proc/net/{name}").read_text(encoding="ascii").splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            _, local, _, state, *_ = line.split()
            address, _, port = local.partition(":")
            if state == _LISTEN and not is_loopback(address):
                found.add(int(port, 16))
    return [str(port) for port in sorted(found)]


def main() -> int:
    case = FrontCase(**json.loads(sys.stdin.readline()))
    os.environ.update(case.env)
    result = measure(case)
    print(json.dumps(asdict(result)), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
