"""Decode steps in buckets: one token of each sequence, padded to a shape that repeats, so that CUDA
can replay a captured graph instead of launching a thousand kernels.

A bucket is (rows, pages): both are rounded up to powers of two. Everything else about a step is in
four tensors of a fixed size, which are written before each replay. Without CUDA, or with ops that
look at their data, the same rows run one op at a time.

Shape suffixes: R rows (padded), T places of a page table.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from model.config import CSA_RATIO
from model.device.network import DeviceNetwork, Output
from model.device.pools import Pools
from model.device.rows import step_rows, upload
from model.device.sequence import DeviceSequence, Picked
from penstock.blocks import BLOCK_TOKENS

MOST_ROWS = 256
_LEAST_PAGES = 4
_MOST_KEYS = 1 << 20
"""Key rows that a layer of a step may gather at once: 1 GiB of 512 channels."""
_MOST_GRAPHS = 48
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Bucket:
    rows: int
    pages: int

    @classmethod
    def of(cls, rows: int, tokens: int) -> Bucket:
        """The least bucket for that many rows whose longest context is `tokens`."""
        pages = -(-tokens // BLOCK_TOKENS)
        return cls(_power(rows), max(_power(pages), _LEAST_PAGES))


def _power(value: int) -> int:
    return 1 << max(value - 1, 0).bit_length()


@dataclass
class Inputs:
    """The four tensors that a step reads (`step_rows`), at fixed addresses."""

    tokens_R: Tensor
    positions_R: Tensor
    places_R: Tensor
    tables_RT: Tensor

    @classmethod
    def empty(cls, bucket: Bucket, device: torch.device) -> Inputs:
        line = torch.zeros((3, bucket.rows), dtype=torch.int64, device=device)
        shape = (bucket.rows, bucket.pages)
        tables = torch.zeros(shape, dtype=torch.int32, device=device)
        return cls(line[0], line[1], line[2], tables)

    def write(self, sequences: Sequence[DeviceSequence], tokens: Sequence[int]) -> None:
        """Rows without a sequence become padding: place 0, position 0, page 0."""
        rows, pages = self.tables_RT.shape
        line = np.zeros((3, rows), np.int64)
        tables = np.zeros((rows, pages), np.int32)
        for row, (sequence, token) in enumerate(zip(sequences, tokens, strict=True)):
            line[:, row] = token, sequence.position, sequence.place
            known = sequence.pages[:pages]
            tables[row, : len(known)] = known
        device = self.tokens_R.device
        targets = self.tokens_R, self.positions_R, self.places_R
        for target, values in zip(targets, line, strict=True):
            target.copy_(upload(values, device), non_blocking=True)
        self.tables_RT.copy_(upload(tables, device), non_blocking=True)


class Recorder(Protocol):
    """Makes a run repeatable: what it reads and writes stays where it is."""

    def record(self, run: Callable[[], Output]) -> tuple[Output, Callable[[], None]]:
        """The run's output, and what fills that very output anew from the inputs of the moment."""


class CudaGraphs:
    """Runs become CUDA graphs, which share one pool of memory: they are replayed one at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory: Any = None

    def record(self, run: Callable[[], Output]) -> tuple[Output, Callable[[], None]]:
        device = self._device
        # Once outside: Triton compiles at a kernel's first launch, which a capture cannot hold.
        side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            run()
        torch.cuda.current_stream(device).wait_stream(side)
        torch.cuda.synchronize(device)
        if self._memory is None:
            self._memory = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory):
            output = run()
        return output, graph.replay


class Rerun:
    """The fake: a replay computes again and writes to the first output's tensors, as a graph does.
    It works on any device.
    """

    def record(self, run: Callable[[], Output]) -> tuple[Output, Callable[[], None]]:
        output = run()

        def replay() -> None:
            for old, new in zip(_tensors(output), _tensors(run()), strict=True):
                old.copy_(new)

        return output, replay


def _tensors(output: Output) -> list[Tensor]:
    picked = output.picked
    return [output.hidden_WD, *([] if picked is None else [picked.entries_RK, picked.masses_RK])]


@dataclass(frozen=True)
class _Recorded:
    inputs: Inputs
    output: Output
    replay: Callable[[], None]


class Steps:
    """Runs steps; owns what was recorded. `close` frees it."""

    def __init__(
        self, network: DeviceNetwork, pools: Pools, recorder: Recorder | None = None
    ) -> None:
        """Without a recorder every step runs one op at a time."""
        self._network, self._pools, self._recorder = network, pools, recorder
        self._recorded: OrderedDict[Bucket, _Recorded] = OrderedDict()
        self._generation = pools.generation

    @property
    def recorded(self) -> tuple[Bucket, ...]:
        """Buckets that can be replayed, the one used last at the end."""
        return tuple(self._recorded)

    def close(self) -> None:
        self._recorded.clear()

    def groups(self, sequences: Sequence[DeviceSequence]) -> list[int]:
        """Sizes of consecutive groups of the sequences that may make a step together."""
        sizes: list[int] = []
        longest = count = 0
        for sequence in sequences:
            end = max(longest, sequence.position + 1)
            if count and not self._fits(Bucket.of(count + 1, end)):
                sizes.append(count)
                count, end = 0, sequence.position + 1
            longest, count = end, count + 1
        return [*sizes, count] if count else sizes

    def _fits(self, bucket: Bucket) -> bool:
        c = self._pools.geometry.config
        tokens = bucket.pages * BLOCK_TOKENS
        widest = max(
            (min(tokens // r, c.index_topk) if r == CSA_RATIO else tokens // r)
            for r in (*(r for r in c.ratios if r), tokens)
        )
        return bucket.rows <= MOST_ROWS and bucket.rows * (c.window + widest) <= _MOST_KEYS

    def run(self, sequences: Sequence[DeviceSequence], tokens: Sequence[int]) -> Output:
        """Absorb one token of each; the output's rows are theirs, in order, and stay so."""
        bucket = Bucket.of(len(sequences), max(s.position for s in sequences) + 1)
        if self._recorder is None:
            inputs = Inputs.empty(bucket, self._pools.device)
            inputs.write(sequences, tokens)
            return _first(self._eager(inputs), len(sequences))
        recorded = self._recording(bucket, self._recorder)
        recorded.inputs.write(sequences, tokens)
        recorded.replay()
        # The next replay writes to the same places.
        return _first(recorded.output, len(sequences), copy=True)

    def _eager(self, inputs: Inputs) -> Output:
        rows = step_rows(
            self._pools.geometry,
            inputs.tokens_R,
            inputs.positions_R,
            inputs.places_R,
            inputs.tables_RT,
        )
        return self._network.forward(rows, self._pools.layers, rows.owner_R)

    def _recording(self, bucket: Bucket, recorder: Recorder) -> _Recorded:
        if self._generation != self._pools.generation:
            # Memory has moved: what was recorded points to where it was.
            self._recorded.clear()
            self._generation = self._pools.generation
        if bucket not in self._recorded:
            # Padding only: no sequence is touched while kernels compile and the run is recorded.
            inputs = Inputs.empty(bucket, self._pools.device)
            output, replay = recorder.record(lambda: self._eager(inputs))
            self._recorded[bucket] = _Recorded(inputs, output, replay)
            _log.info("recorded a decode step of %d rows and %d pages", bucket.rows, bucket.pages)
        self._recorded.move_to_end(bucket)
        if len(self._recorded) > _MOST_GRAPHS:
            self._recorded.popitem(last=False)
        return self._recorded[bucket]


def _first(output: Output, count: int, *, copy: bool = False) -> Output:
    """The rows of the first `count` sequences."""

    def part(x: Tensor) -> Tensor:
        return x[:count].clone() if copy else x[:count]

    picked = output.picked
    if picked is not None:
        picked = Picked(part(picked.entries_RK), part(picked.masses_RK))
    return Output(part(output.hidden_WD), picked)
