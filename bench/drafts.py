"""How often drafts were right in a benchmark, from the server's `/metrics`."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Mapping

import httpx

from bench.report import Row
from bench.stats import ratio

SETTLE_S = 2.5
"""Workers tell the directory every second, and the front asks it about as often."""
# Ours (`penstock_worker_spec_decode_...`) and vLLM's (`vllm:spec_decode_...`).
_SAMPLE = re.compile(
    r"^\S*spec_decode_num_(drafts|draft_tokens|accepted_tokens)_total(?:\{[^}]*\})? (\S+)$", re.M
)


def draft_counts(exposition: str) -> Counter[str]:
    """Drafts, draft tokens and accepted tokens of all workers; empty where nothing drafts. Pure."""
    counts: Counter[str] = Counter()
    for name, value in _SAMPLE.findall(exposition):
        counts[name] += int(float(value))
    return counts


def acceptance(before: Mapping[str, int], after: Mapping[str, int]) -> list[Row]:
    """One row, or none if nothing was drafted in between. Pure."""
    drafts, tokens, accepted = (
        after.get(name, 0) - before.get(name, 0)
        for name in ("drafts", "draft_tokens", "accepted_tokens")
    )
    if not drafts:
        return []
    return [
        {
            "drafts": drafts,
            "draft_tokens": tokens,
            "accepted_tokens": accepted,
            "acceptance_rate": ratio(accepted, tokens),
            "tokens_per_drafted_step": ratio(drafts + accepted, drafts),
        }
    ]


def read_counts(url: str, *, settle: bool = False) -> Counter[str]:
    """Now, or with `settle` once the last second's work is counted too. A server without metrics
    drafts nothing.
    """
    try:
        counts = _read(url)
        if settle and any(counts.values()):
            time.sleep(SETTLE_S)
            counts = _read(url)
    except httpx.HTTPError:
        return Counter()
    return counts


def _read(url: str) -> Counter[str]:
    base = url.rstrip("/").removesuffix("/v1")
    return draft_counts(httpx.get(f"{base}/metrics", timeout=30, trust_env=False).text)
