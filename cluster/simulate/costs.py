"""What a worker's work costs in the simulator: seconds from tokens, bytes from tokens.

    prefill step of u tokens that end at context c, summed over the step's pieces:
        prefill_step_s + u / prefill_tokens_per_s + prefill_context_s * u * (c - u / 2)
    decode step of n streams with C tokens of context together:
        decode_step_s + n * decode_stream_s + C * decode_context_s

`flash` and `pro` are derived, not measured: one worker is a node of eight H100-class GPUs that
reaches the kernel targets of the design's table. The derivation stands in `docs/simulator.md`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from penstock.blocks import STATE_ALIGN_TOKENS
from penstock.errors import UsageError
from penstock.settings import Section, Size, did_you_mean, validated


class Costs(Section):
    """One model on one kind of worker. Seconds, bytes, tokens."""

    prefill_tokens_per_s: float = Field(gt=0)
    prefill_context_s: float = Field(default=0.0, ge=0)
    """For each pair of a computed token and a token before it."""
    prefill_step_s: float = Field(default=0.0, ge=0)
    decode_step_s: float = Field(gt=0)
    decode_stream_s: float = Field(default=0.0, ge=0)
    decode_context_s: float = Field(default=0.0, ge=0)
    fetch_bytes_per_s: float = Field(default=1.3e9, gt=0)
    """Of one worker, from and to the store."""
    bytes_per_token: float = Field(gt=0)
    state_bytes: int = Field(default=0, ge=0)
    """One retained state; 0: states are left out and every block border can be resumed."""
    front_s: float = Field(default=0.005, ge=0)
    """Fixed, before the decode worker is asked: HTTP, encoding, routing."""
    reserve_s: float = Field(default=0.002, ge=0)
    """Fixed, from a credit to the prompt's place in the prefill worker's line."""
    restore_s: float = Field(default=0.002, ge=0)
    """Fixed, of each look-up in the store."""
    handover_s: float = Field(default=0.005, ge=0)
    """Fixed, from the last commit to a place in the decode batch."""
    deliver_s: float = Field(default=0.001, ge=0)
    """Fixed, from a drawn token to the client."""
    chunk_tokens: int = Field(default=2048, ge=16)
    prefill_running: int = Field(default=8, ge=1)
    prefill_queued: int = Field(default=256, ge=0)
    most_prefill_wait_s: float | None = Field(default=None, gt=0)
    """A prompt is refused at once if a prefill worker's line is predicted to take longer."""
    prefill_memory_bytes: Size = Field(default=1 << 40, ge=1)
    decode_running: int = Field(default=16, ge=1)
    decode_queued: int = Field(default=256, ge=0)
    decode_memory_bytes: Size = Field(default=1 << 40, ge=1)
    admission: bool = True
    """Refuse at once what is predicted to wait longer than its patience; else all of it queues."""
    admission_timeout_s: float = Field(default=30.0, gt=0)
    """Patience of a request in a decode worker's line."""
    max_context: int = Field(default=1 << 20, ge=STATE_ALIGN_TOKENS)

    def prefill_piece_s(self, tokens: int, end: int) -> float:
        """`tokens` computed up to position `end`, without the step's fixed part."""
        context = tokens * (end - tokens / 2)
        return tokens / self.prefill_tokens_per_s + self.prefill_context_s * context

    def decode_s(self, streams: int, context: int) -> float:
        """One step."""
        work = streams * self.decode_stream_s + context * self.decode_context_s
        return self.decode_step_s + work

    def size_bytes(self, tokens: int) -> int:
        return max(1, round(tokens * self.bytes_per_token))

    def transfer_s(self, size_bytes: float) -> float:
        return size_bytes / self.fetch_bytes_per_s


# docs/simulator.md has the arithmetic and the source of each figure.
PRESETS: Mapping[str, Costs] = {
    "flash": Costs(
        prefill_tokens_per_s=130_000,
        prefill_context_s=1.9e-11,
        prefill_step_s=0.003,
        decode_step_s=0.0085,
        decode_stream_s=8.6e-6,
        decode_context_s=1.7e-11,
        bytes_per_token=3514.25,
        state_bytes=3_640_000,
        chunk_tokens=8192,
        decode_running=256,
        prefill_memory_bytes=200 << 30,
        decode_memory_bytes=300 << 30,
    ),
    "pro": Costs(
        prefill_tokens_per_s=36_000,
        prefill_context_s=3.8e-11,
        prefill_step_s=0.004,
        decode_step_s=0.036,
        decode_stream_s=3.1e-5,
        decode_context_s=2.4e-11,
        bytes_per_token=5031,
        state_bytes=5_170_000,
        chunk_tokens=8192,
        decode_running=256,
        prefill_memory_bytes=100 << 30,
        decode_memory_bytes=150 << 30,
    ),
    "ledger": Costs(
        prefill_tokens_per_s=28_000,
        prefill_context_s=5e-11,
        prefill_step_s=0.001,
        decode_step_s=0.0002,
        decode_stream_s=0.0012,
        decode_context_s=5e-9,
        fetch_bytes_per_s=1e9,
        bytes_per_token=51.8,
        state_bytes=40_000,
        prefill_memory_bytes=1 << 30,
        decode_memory_bytes=1 << 30,
    ),
    "fake": Costs(
        prefill_tokens_per_s=20_000,
        decode_step_s=0.010,
        fetch_bytes_per_s=1e9,
        bytes_per_token=8,
        state_bytes=600,
        prefill_memory_bytes=1 << 30,
        decode_memory_bytes=1 << 30,
    ),
}


def open_costs(
    model: str, *, file: Path | None = None, given: Mapping[str, Any] | None = None
) -> Costs:
    """A preset, over it a YAML file, over it `given` (None means not given).

    Raises UsageError that names the coefficient and where it came from.
    """
    if model not in PRESETS:
        raise UsageError(f"no costs are known of the model '{model}'{did_you_mean(model, PRESETS)}")
    values: dict[str, Any] = PRESETS[model].model_dump()
    origin: dict[str, str] = {}
    if file is not None:
        for name, value in _from_file(file).items():
            values[name], origin[name] = value, f"file {file}"
    for name, value in (given or {}).items():
        if value is not None:
            values[name], origin[name] = value, "command line"
    return validated(Costs, values, origin)


def _from_file(file: Path) -> Mapping[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(file.read_bytes())
    except OSError as error:
        raise UsageError(f"cannot read the costs {file}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise UsageError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{file} must hold coefficients, one 'name: value' a line")
    return {str(name): value for name, value in content.items()}
