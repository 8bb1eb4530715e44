"""Several ranks in one process: every engine call made by one thread a rank, as followers do."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model.engine import Engine, Segment
from model.load import load_engine
from model.ranks.threads import thread_ranks
from tests.model.engine_contract import snapshot


class Ranks:
    """Rank r's engine belongs to thread r. `each` gives every rank's answer, by rank."""

    def __init__(self, folder: Path, *, tp: int = 1, ep: int = 1, cp: int = 1, **options: Any):
        comms = thread_ranks(tp=tp, ep=ep, cp=cp)
        self._threads = [ThreadPoolExecutor(1, initializer=_one_thread) for _ in comms]
        opened = [
            thread.submit(load_engine, folder, comm=comm, **options)
            for thread, comm in zip(self._threads, comms, strict=True)
        ]
        self.engines: list[Engine] = [future.result() for future in opened]

    def each(self, work: Callable[[Engine], Any]) -> list[Any]:
        futures = [
            thread.submit(work, engine)
            for thread, engine in zip(self._threads, self.engines, strict=True)
        ]
        return [future.result(timeout=60) for future in futures]

    def close(self) -> None:
        for engine in self.engines:
            engine.close()
        for thread in self._threads:
            thread.shutdown()


def _one_thread() -> None:
    torch.set_num_threads(1)


@contextlib.contextmanager
def ranks(folder: Path, **options: Any) -> Iterator[Ranks]:
    opened = Ranks(folder, **options)
    try:
        yield opened
    finally:
        opened.close()


def rows_and_snapshot(
    tokens: list[int], ends: list[int], *, move_at: int | None = None
) -> Callable[[Engine], tuple[Any, list[bytes], Any]]:
    """Work for `Ranks.each`: absorb in chunks that end at `ends`, give all logits, what the outside
    can see, and the evidence. After the chunk that ends at `move_at` the sequence moves to a fresh
    one.
    """

    def work(engine: Engine) -> tuple[Any, list[bytes], Any]:
        sequence = engine.open(len(tokens))
        rows: list[Any] = []
        for end in ends:
            segment = Segment(sequence, tokens[sequence.position : end], all_logits=True)
            (result,) = engine.forward([segment])
            assert result.logits is not None
            rows += [np.array(result.logits.row(i)) for i in range(len(result.logits))]
            if end == move_at:
                *blocks, state, _ = snapshot(engine, sequence)
                engine.release(sequence)
                sequence = engine.open(len(tokens))
                for index, block in enumerate(blocks):
                    engine.load_block(sequence, index, block)
                engine.load_state(sequence, end, state)
        seen = snapshot(engine, sequence)
        evidence = [replace(span) for span in engine.evidence(sequence)]
        engine.release(sequence)
        return np.stack(rows), seen, evidence

    return work
