"""A stack of layers as an engine runs it: prefill, decode steps and memory as the context grows,
and whether class `exact` keeps its promise on this device.
"""

from __future__ import annotations

import random
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bench.kernels_random import FLASH, TINY, random_engine
from model.config import ModelConfig
from model.device.check import device_ops
from model.device.engine import DeviceEngine
from model.engine import Segment
from model.engine import Sequence as EngineSequence
from penstock.errors import OverloadedError


@dataclass(frozen=True)
class StackPlan:
    config: ModelConfig
    contexts: tuple[int, ...]
    """Ascending; one sequence grows through them."""
    chunk: int
    steps: int
    batches: tuple[int, ...]
    """Sequences of a step; those beside the long one are short."""

    @classmethod
    def full(cls) -> StackPlan:
        # A few tokens of the last context are generated, not read.
        return cls(FLASH, (4096, 65_536, 262_144, 1_048_000), 2048, 32, (1, 8))

    @classmethod
    def tiny(cls) -> StackPlan:
        return cls(TINY, (300, 600), 256, 2, (1, 2))


def run(
    plan: StackPlan, device: torch.device, *, backend: str | None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of the table of contexts, for both numerics classes, and of the table of promises."""
    rows: list[dict[str, Any]] = []
    promises: list[dict[str, Any]] = []
    for numerics in ("fast", "exact"):
        ops = device_ops(device, exact=numerics == "exact", backend=backend)
        engine = random_engine(plan.config, ops, device, numerics=numerics)
        try:
            if numerics == "exact":
                promises = promises_of(engine)
            rows += _contexts(plan, engine, device, numerics)
        finally:
            engine.close()
            del engine
            _empty(device)
    return rows, promises


def _contexts(
    plan: StackPlan, engine: DeviceEngine, device: torch.device, numerics: str
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    tokens = _tokens(plan.config.vocab_size, plan.contexts[-1], seed=1)
    first: float | None = None
    try:
        sequence = engine.open(plan.config.max_positions)
        others = [engine.open(4096) for _ in range(max(plan.batches) - 1)]
    except OverloadedError as error:
        return [{"class": numerics, "context": plan.contexts[0], "not_run": error.message}]
    for other in others:
        engine.forward([Segment(other, tokens[:64])])
    spent_s = 0.0
    for context in plan.contexts:
        _reset_peak(device)
        chunks = _prefill(engine, sequence, tokens, context, plan.chunk)
        spent_s += sum(seconds for _, seconds in chunks)
        last = chunks[-8:]
        row: dict[str, Any] = {
            "class": numerics,
            "context": context,
            "prefill_tokens_per_s": context / spent_s,
            "prefill_tokens_per_s_here": sum(n for n, _ in last) / sum(s for _, s in last),
        }
        for batch in plan.batches:
            step_ms = _steps(engine, [sequence, *others[: batch - 1]], plan.steps, tokens)
            row[f"decode_ms_batch_{batch}"] = step_ms
            if batch == 1:
                first = first or step_ms
                row["growth"] = step_ms / first
        row["peak_memory_gib"] = _peak(device) / 2**30
        row["sequence_cache_gib"] = engine.bytes_for(context) / 2**30
        rows.append(row)
    for each in (sequence, *others):
        engine.release(each)
    return rows


def _prefill(
    engine: DeviceEngine, sequence: EngineSequence, tokens: list[int], context: int, chunk: int
) -> list[tuple[int, float]]:
    """Tokens and seconds of each chunk; the device is waited for after every one."""
    spent = []
    while sequence.position < context:
        part = tokens[sequence.position : min(sequence.position + chunk, context)]
        began_s = time.perf_counter()
        engine.forward([Segment(sequence, part)])
        engine.logits([sequence])
        spent.append((len(part), time.perf_counter() - began_s))
    # Decode steps of the context before may have gone beyond a small one.
    return spent or [(0, 1e-9)]


def _steps(
    engine: DeviceEngine, sequences: Sequence[EngineSequence], count: int, tokens: list[int]
) -> float:
    """Median milliseconds of a step with its logits on the host; compiling and capturing are not in
    it.
    """
    spent = []
    for number in range(count + 2):
        began_s = time.perf_counter()
        engine.forward([Segment(s, [tokens[number]]) for s in sequences])
        engine.logits(sequences)
        spent.append((time.perf_counter() - began_s) * 1e3)
    kept = sorted(spent[2:])
    return kept[len(kept) // 2]


def promises_of(engine: DeviceEngine) -> list[dict[str, Any]]:
    """Whether one prompt's blocks, state and logits are the same bytes whichever way it came."""
    tokens = _tokens(engine.info.vocab_size, 330, seed=2)

    def bits(chunks: Sequence[int], *, beside: bool) -> bytes:
        sequence, other = engine.open(len(tokens)), engine.open(len(tokens))
        for size in chunks:
            at = sequence.position
            side = [Segment(other, tokens[:3])] if beside and other.position < 300 else []
            engine.forward([*side, Segment(sequence, tokens[at : at + size])])
        found = engine.export_block(sequence, 0) + engine.export_state(sequence)
        found += bytes(engine.logits([sequence]).row(0))
        engine.release(sequence)
        engine.release(other)
        return found

    whole = bits([330], beside=False)
    ways = {
        "in chunks of 100": bits([100] * 4, beside=False),
        "in chunks of 77, another sequence beside it": bits([77] * 5, beside=True),
        "the last 10 tokens one by one": bits([320] + [1] * 10, beside=False),
        "the last 10 one by one, another sequence beside it": bits([320] + [1] * 10, beside=True),
    }
    return [{"exact": way, "same_bits": found == whole} for way, found in ways.items()]


def _tokens(vocab_size: int, count: int, *, seed: int) -> list[int]:
    return random.Random(seed).choices(range(vocab_size), k=count)


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak(device: torch.device) -> int:
    """On the device since the last reset; without CUDA of this process since its start."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _empty(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
