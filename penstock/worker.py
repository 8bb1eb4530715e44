"""What a worker process is told at its start: plain data, so that any launcher can carry it as
JSON.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from penstock.peers import ALONE, Peers
from penstock.telemetry_spec import TelemetrySpec

MOST_DRAFT_TOKENS = 16


def _draft_tokens(value: Any) -> Any:
    """An integer or `auto`; in text both."""
    text = str(value).strip()
    if text == "auto" or (text.isdecimal() and int(text) <= MOST_DRAFT_TOKENS):
        return text if text == "auto" else int(text)
    raise ValueError(f"{value!r} is neither 'auto' nor a number from 0 to {MOST_DRAFT_TOKENS}")


DraftTokens = Annotated[int | Literal["auto"], BeforeValidator(_draft_tokens)]


class ModelSpec(BaseModel):
    """Which model to open and how."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    """A folder, `ledger` (the shipped model) or `fake`."""
    served_name: str = ""
    kv_cache_dtype: str = "fp8"
    dtype: str = "auto"
    rounding: str = "auto"
    """Rounding points beside the cache rows: `auto`, `none`, or some of activations, index and
    scores with commas between.
    """
    numerics: str = "exact"
    device: str = "auto"
    max_model_len: int | None = None
    torch_threads: int = Field(default=1, ge=1)
    num_speculative_tokens: DraftTokens = "auto"
    """Most tokens that decode drafts at once with the checkpoint's own draft module: `auto` (what
    the checkpoint was trained for), 0 (none) to 16. Answers are the same either way. Prefill and
    decode must agree: it is part of the fingerprint.
    """
    draft_confidence: float = Field(default=0.0, ge=0.0, le=1.0)
    """DSpark: a draft ends before the first token that its confidence head trusts less."""
    fake_prefill_tokens_per_s: float = 0.0
    fake_decode_step_ms: float = 0.0
    fake_draft_accuracy: float = Field(default=0.7, ge=0.0, le=1.0)
    """Share of the fake's draft tokens that are right; it drafts only if told how many."""


class RankSpec(BaseModel):
    """Over how many ranks one worker's model is cut (docs/parallel.md)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tensor: int = Field(default=1, ge=1)
    expert: int = Field(default=1, ge=1)
    context: int = Field(default=1, ge=1)
    timeout_s: float = Field(default=60.0, gt=0)
    """Longest wait of one rank for another in the middle of a model step."""

    @property
    def world(self) -> int:
        return self.tensor * self.expert * self.context


class WorkerSpec(BaseModel):
    """Identity, addresses and limits of one prefill or decode worker."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    worker_id: str
    model: ModelSpec
    store_address: str
    index_url: str | None = None
    """Redis URL of the index, or None for the store node's own."""
    listen_host: str = "127.0.0.1"
    peers: Peers = ALONE
    """What this worker shows to store and front, and asks of who calls it."""
    ranks: RankSpec = RankSpec()
    telemetry: TelemetrySpec = TelemetrySpec()
    heartbeat_s: float = Field(default=1.0, gt=0)
    directory_ttl_s: float = Field(default=5.0, gt=0)
    lease_ttl_s: float = Field(default=30.0, gt=0)
    chunk_tokens: int = Field(default=2048, ge=16)
    """Prefill: most tokens of one model step."""
    queue_timeout_s: float = Field(default=3600.0, gt=0)
    """Prefill: longest wait for cache memory; a decode worker is told by each request."""
    answer_room_tokens: int = Field(default=1024, ge=16)
    """Decode: of an answer, for which there is room before anything is read; it grows by as much.
    """
    grant_ttl_s: float = Field(default=120.0, gt=0)
    """Decode: a place that no prefill worker has begun to fill after so long goes to the next."""
    max_running: int = Field(default=16, ge=1)
    """Most requests worked on at once."""
    max_queued: int = Field(default=256, ge=0)
    """Most requests that wait; one more is refused."""
    kv_memory_bytes: int = Field(default=1 << 30, ge=1 << 16)
    """Cache memory for sequences."""
