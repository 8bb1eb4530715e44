"""Replay of a prefix trace through the store's own catalogue: hit rate, bytes, evictions.

A trace has one request a line, as the Mooncake traces do (Qin et al., FAST 2025): `hash_ids`, one
id for each block of 512 tokens of the prompt, equal ids for equal prefixes, `input_length` in
tokens; other fields are passed over. A last block that is not full is not stored, as in serving.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvstore.catalog import Catalog, Limits
from kvstore.policy.contracts import EvictionPolicy
from penstock.blocks import ObjectKind
from penstock.errors import InvalidRequestError, OverloadedError, UsageError

TRACE_BLOCK_TOKENS = 512
_LEASE_S = 1.0


@dataclass(frozen=True)
class TraceRequest:
    """One prompt: its length in tokens and the ids of its full blocks."""

    tokens: int
    blocks: tuple[bytes, ...]


@dataclass(frozen=True)
class ReplayResult:
    """What a store of `capacity_bytes` would have done. Hit rates are of all prompt tokens."""

    requests: int
    prompt_tokens: int
    hit_tokens: int
    capacity_bytes: int
    unique_bytes: int
    written_bytes: int
    evictions: int
    refused: int
    """Blocks that found no room because the request itself held everything."""

    @property
    def hit_rate(self) -> float:
        return self.hit_tokens / self.prompt_tokens if self.prompt_tokens else 0.0


def read_trace(path: Path) -> list[TraceRequest]:
    """Every request of a JSONL trace. Raises UsageError with the line that cannot be read."""
    try:
        with path.open(encoding="utf-8") as lines:
            return list(_parse(lines, path))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise UsageError(f"the trace {path} cannot be read: {reason}") from error


def _parse(lines: Iterator[str], path: Path) -> Iterator[TraceRequest]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row: Any = json.loads(line)
            tokens = int(row["input_length"])
            ids = [int(id_).to_bytes(32, "big") for id_ in row["hash_ids"]]
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise UsageError(
                f"line {number} of {path} is no request of a trace: it needs input_length and "
                f"hash_ids, both whole numbers ({type(error).__name__})"
            ) from error
        yield TraceRequest(tokens, tuple(ids[: tokens // TRACE_BLOCK_TOKENS]))


def unique_bytes(trace: Sequence[TraceRequest], *, bytes_per_token: float) -> int:
    """Bytes of all different blocks: what a store that never evicts would hold."""
    ids = {id_ for request in trace for id_ in request.blocks}
    return len(ids) * _block_bytes(bytes_per_token)


def replay(
    trace: Sequence[TraceRequest],
    *,
    policy: EvictionPolicy,
    capacity_bytes: int,
    bytes_per_token: float,
) -> ReplayResult:
    """Every request in order, one at a time: look up, lease, write what is missing, release."""
    size = _block_bytes(bytes_per_token)
    now = 0.0
    limits = Limits(
        capacity_bytes=max(capacity_bytes, size),
        max_object_bytes=size,
        max_objects=1 << 40,
        max_leases=1 << 40,
        max_lease_ttl_s=_LEASE_S,
    )
    catalog = Catalog(limits, policy=policy, clock=lambda: now)
    hit_tokens = written = refused = 0
    for number, request in enumerate(trace):
        owner = str(number)
        present = catalog.has(request.blocks)
        hits = present.index(False) if False in present else len(present)
        catalog.lease(owner, request.blocks[:hits], _LEASE_S)
        hit_tokens += hits * TRACE_BLOCK_TOKENS
        for index in range(hits, len(request.blocks)):
            if not _write(catalog, request.blocks, index, size, owner):
                refused += len(request.blocks) - index
                break
            written += size
        catalog.release(owner)
        catalog.take_dropped()
    return ReplayResult(
        requests=len(trace),
        prompt_tokens=sum(request.tokens for request in trace),
        hit_tokens=hit_tokens,
        capacity_bytes=capacity_bytes,
        unique_bytes=unique_bytes(trace, bytes_per_token=bytes_per_token),
        written_bytes=written,
        evictions=catalog.usage().evictions,
        refused=refused,
    )


def _write(catalog: Catalog, blocks: Sequence[bytes], index: int, size: int, owner: str) -> bool:
    try:
        reservation = catalog.reserve(blocks[index], ObjectKind.BLOCK, size)
    except OverloadedError:
        return False
    catalog.commit(
        reservation,
        digest=b"",
        owner=owner,
        ttl_s=_LEASE_S,
        rolling=False,
        parent=blocks[index - 1] if index else b"",
        position=(index + 1) * TRACE_BLOCK_TOKENS,
    )
    return True


def _block_bytes(bytes_per_token: float) -> int:
    if not bytes_per_token > 0:
        raise InvalidRequestError("bytes per token must be positive")
    return max(1, round(bytes_per_token * TRACE_BLOCK_TOKENS))
