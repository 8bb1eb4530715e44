"""`DeviceEngine`: the `Engine` contract over device ops (architecture.md, "Numerics classes").

The same code runs on CUDA with Triton's kernels, and on a CPU with the reference ops or Triton's
interpreter. Blocks and states have the CPU engine's layout; what tells the engines apart is the
fingerprint. It does not draft: `seek` is there, the draft module is not.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from kernels.device import ReferenceDeviceOps
from model.config import CSA_RATIO, ModelConfig
from model.device.check import platform_facts
from model.device.network import PASS_ROWS, DeviceNetwork, Output
from model.device.pools import Geometry, Pools
from model.device.rows import Span, prompt_rows, upload
from model.device.sequence import DeviceSequence, Trail
from model.device.steps import CudaGraphs, Recorder, Steps
from model.device.weights import ExpertFormat, Loader, Tensors
from model.device.wire import Wire
from model.device.work import Part, Work, checked, next_pass
from model.engine import (
    Buffer,
    DraftRequest,
    EngineInfo,
    Evidence,
    Segment,
    SegmentResult,
    Sequence,
)
from model.grid import Grid
from model.layout import cache_layout
from model.options import DTYPES, EngineOptions, fingerprint_facts
from model.torch_engine import TorchLogits
from penstock.blocks import BLOCK_TOKENS
from penstock.errors import OverloadedError
from penstock.identity import fingerprint

PASS_CONTEXT = 1 << 21
"""Positions of all sequences of a prompt pass: a quarter of them are rows of 1 KiB in a buffer."""
EXACT_TILE = 64
"""Rows of every product's tile in class `exact`, of prompts and answers alike."""


class DeviceEngine:
    """See the module. One thread at a time; starts none itself."""

    def __init__(
        self,
        config: ModelConfig,
        tensors: Tensors,
        *,
        weights_digest: str,
        options: EngineOptions,
        ops: ReferenceDeviceOps,
        device: torch.device,
        experts: ExpertFormat,
        rounded: frozenset[str] = frozenset(),
        recorder: Recorder | None = None,
    ) -> None:
        """`tensors` are taken out one by one. What cannot run was refused before
        (`model.device.check`). `recorder` of decode steps: CUDA graphs where they are possible.
        """
        self._config, self._device = config, device
        self._layout = cache_layout(config, options.kv)
        exact = options.numerics == "exact"
        dtype = DTYPES[options.dtype]
        geometry = Geometry.of(config)
        loader = Loader(
            tensors,
            ops,
            device=device,
            dtype=dtype,
            rounded=rounded if options.rounding.activations else frozenset(),
            experts=experts,
            tile=EXACT_TILE,
            library=not exact and device.type == "cuda",
        )
        with torch.inference_mode():
            self._network = DeviceNetwork(
                config,
                loader,
                geometry,
                ops=ops,
                device=device,
                dtype=dtype,
                rounding=options.rounding,
                exact=exact,
                tile=EXACT_TILE,
            )
            self._pools = Pools(geometry, device)
        self._wire = Wire(self._layout, self._pools)
        if recorder is None and ops.captures and device.type == "cuda":
            recorder = CudaGraphs(device)
        self.steps = Steps(self._network, self._pools, recorder)
        self._owner = object()
        self._open: dict[int, DeviceSequence] = {}
        facts = fingerprint_facts(
            config,
            options,
            weights_digest,
            self._layout.to_json(),
            ops.name,
            EXACT_TILE,
            Grid(),
            platform_facts(device, ops, EXACT_TILE),
        )
        self._info = EngineInfo(
            fingerprint=fingerprint(facts),
            layout=self._layout,
            vocab_size=config.vocab_size,
            max_model_len=options.max_model_len,
            eos_token_ids=config.eos_token_ids,
            numerics=options.numerics,
            description=(
                f"torch {torch.__version__} {device.type}, {ops.name}, {config.layers} layers, "
                f"experts {experts.value}, {options.dtype}"
            ),
        )

    @property
    def info(self) -> EngineInfo:
        return self._info

    @property
    def open_sequences(self) -> int:
        return len(self._open)

    def bytes_for(self, tokens: int) -> int:
        return self._pools.geometry.bytes_for(tokens)

    @torch.inference_mode()
    def open(self, capacity: int) -> DeviceSequence:
        if not 0 < capacity <= self._info.max_model_len:
            raise ValueError(f"capacity {capacity} is outside 1..{self._info.max_model_len}")
        try:
            place, pages = self._pools.take(capacity)
        except torch.OutOfMemoryError:
            raise OverloadedError(
                f"the device has no memory for {self.bytes_for(capacity) >> 20} MiB more of cache "
                f"({capacity} tokens); lower the cache memory of this worker"
            ) from None
        sequence = DeviceSequence(capacity, place, pages, owner=self._owner)
        self._open[id(sequence)] = sequence
        return sequence

    def grow(self, sequence: Sequence, capacity: int) -> None:
        mine = self._live(sequence)
        if not mine.capacity <= capacity <= self._info.max_model_len:
            raise ValueError(
                f"capacity {capacity} is outside {mine.capacity}..{self._info.max_model_len}"
            )
        try:
            more = self._pools.take_pages(
                self._pools.geometry.pages_for(capacity) - len(mine.pages)
            )
        except torch.OutOfMemoryError:
            raise OverloadedError(
                f"the device has no memory to grow a sequence to {capacity} tokens; lower the "
                "cache memory of this worker"
            ) from None
        mine.grow(capacity, more)

    def release(self, sequence: Sequence) -> None:
        mine = self._mine(sequence)
        if mine.released:
            return
        mine.released, mine.hidden_D, mine.trail = True, None, None
        mine.tell(None, 0)
        self._pools.give_back(mine.place, mine.pages)
        self._open.pop(id(mine), None)

    @torch.inference_mode()
    def load_block(self, sequence: Sequence, index: int, payload: Buffer) -> None:
        mine = self._live(sequence)
        if len(payload) != self._layout.block_bytes:
            raise ValueError(f"a block has {self._layout.block_bytes} bytes, not {len(payload)}")
        if mine.position or mine.loaded_blocks != index:
            raise ValueError(f"block {index} is out of order")
        if (index + 1) * BLOCK_TOKENS > mine.capacity:
            raise ValueError(f"block {index} is beyond the sequence's capacity {mine.capacity}")
        self._wire.load_block(mine, index, memoryview(payload))

    @torch.inference_mode()
    def load_state(self, sequence: Sequence, position: int, payload: Buffer) -> None:
        mine = self._live(sequence)
        if len(payload) != self._layout.state_bytes(position):
            raise ValueError(
                f"this state has {self._layout.state_bytes(position)} bytes, not {len(payload)}"
            )
        if mine.position:
            raise ValueError(f"this sequence is at position {mine.position} already")
        if mine.loaded_blocks < position // BLOCK_TOKENS:
            raise ValueError(f"state at {position} needs {position // BLOCK_TOKENS} blocks first")
        if position > mine.capacity:
            raise ValueError(f"position {position} is beyond the capacity {mine.capacity}")
        self._wire.load_state(mine, position, memoryview(payload))

    def replay(self, sequence: Sequence, start: int) -> None:
        raise ValueError("this engine cannot replay")

    @torch.inference_mode()
    def forward(self, segments: Seq[Segment]) -> list[SegmentResult]:
        work = [
            checked(segment, self._live(segment.sequence), self._config.vocab_size)
            for segment in segments
        ]
        if len({id(item.sequence) for item in work}) != len(work):
            raise ValueError("a sequence appears in two segments of one forward")
        states: list[dict[int, bytes]] = [{} for _ in work]
        rows: dict[int, list[Tensor]] = {}
        pending = [item for item in work if item.tokens]
        for item in pending:
            item.sequence.trail = None
        while pending:
            parts = self._next(pending)
            for part, hidden in zip(parts, self._pass(parts), strict=True):
                item, position = part.work, part.work.sequence.position
                item.done += len(part.tokens)
                if item.all_logits:
                    rows.setdefault(id(item), []).append(hidden)
                if position in item.states_at:
                    states[work.index(item)][position] = self._wire.export_state(item.sequence)
            pending = [item for item in pending if item.done < len(item.tokens)]
        return [
            SegmentResult(found, self._host_logits(rows.get(id(item))))
            for item, found in zip(work, states, strict=True)
        ]

    def _next(self, pending: list[Work]) -> list[Part]:
        """A step of the sequences that have one token, as many as fit; else a prompt pass."""
        singles = [item for item in pending if len(item.take(2)) == 1]
        if not singles:
            return next_pass(pending, rows=PASS_ROWS, context=PASS_CONTEXT)
        count = self.steps.groups([item.sequence for item in singles])[0]
        return [Part(item, item.take(1)) for item in singles[:count]]

    def _pass(self, parts: list[Part]) -> list[Tensor]:
        """Hidden rows of each part: of its last token, or of every one."""
        spans: list[Span] = []
        wanted: list[int] = []
        counts: list[int] = []
        row = 0
        for part in parts:
            sequence, count = part.work.sequence, len(part.tokens)
            spans.append(Span(sequence, row, count, sequence.position))
            counts.append(count if part.work.every else 1)
            row += count
            wanted += range(row - counts[-1], row)
        tokens = [token for part in parts for token in part.tokens]
        if row == len(parts):
            output = self.steps.run([span.sequence for span in spans], tokens)
        else:
            output = self._prompt(spans, tokens, wanted)
        hidden = list(torch.split(output.hidden_WD, counts))
        first = 0
        for part, span, rows in zip(parts, spans, hidden, strict=True):
            self._stand(part.work, span, rows, output, first)
            first += rows.shape[0]
        return hidden

    def _prompt(self, spans: list[Span], tokens: list[int], wanted: list[int]) -> Output:
        rows = prompt_rows(self._pools.geometry, spans, tokens, self._device)
        index = upload(torch.tensor(wanted).numpy(), self._device)
        return self._network.forward(rows, self._pools.layers, index)

    @staticmethod
    def _stand(work: Work, span: Span, hidden: Tensor, output: Output, first: int) -> None:
        """The sequence after its span; `first` is the first of its rows in `output`."""
        sequence = work.sequence
        sequence.position = span.end
        sequence.hidden_D = hidden[-1]
        sequence.tell(output.picked, first + hidden.shape[0] - 1)
        if work.seekable:
            sequence.trail = Trail(span.position, span.count, hidden, output.picked, first)

    @torch.inference_mode()
    def seek(self, sequence: Sequence, position: int) -> None:
        self._live(sequence).seek(position)

    def draft(self, requests: Seq[DraftRequest]) -> list[list[int]]:
        for request in requests:
            mine = self._live(request.sequence)
            if mine.position < 1 or request.count:
                raise ValueError("this engine does not draft: 0 tokens are the most")
        return [[] for _ in requests]

    @torch.inference_mode()
    def export_block(self, sequence: Sequence, index: int) -> bytes:
        mine = self._live(sequence)
        if index < 0 or (index + 1) * BLOCK_TOKENS > mine.position:
            raise ValueError(f"block {index} is not complete at position {mine.position}")
        return self._wire.export_block(mine, index)

    @torch.inference_mode()
    def export_state(self, sequence: Sequence) -> bytes:
        mine = self._live(sequence)
        if mine.position < 1:
            raise ValueError("an empty sequence has no state")
        return self._wire.export_state(mine)

    @torch.inference_mode()
    def logits(self, sequences: Seq[Sequence]) -> TorchLogits:
        mine = [self._live(sequence) for sequence in sequences]
        if any(sequence.position < 1 for sequence in mine):
            raise ValueError("an empty sequence has no next-token logits")
        found = [s.hidden_D[None] for s in mine if s.hidden_D is not None]
        return self._host_logits(found) or TorchLogits(torch.empty((0, self._config.vocab_size)))

    def _host_logits(self, hidden: list[Tensor] | None) -> TorchLogits | None:
        if not hidden:
            return None
        return TorchLogits(self._network.logits(torch.cat(hidden)).cpu())

    def evidence(self, sequence: Sequence) -> list[Evidence]:
        mine = self._live(sequence)
        # An entry pools its own window and the one before it (deepseek-v4.md 2.3).
        return [
            Evidence(max(entry - 1, 0) * CSA_RATIO, (entry + 1) * CSA_RATIO, mass)
            for entry, mass in mine.evidence
        ]

    def check(self) -> None:
        return

    def close(self) -> None:
        for sequence in list(self._open.values()):
            self.release(sequence)
        self.steps.close()

    def _mine(self, sequence: Sequence) -> DeviceSequence:
        if isinstance(sequence, DeviceSequence) and sequence.owner is self._owner:
            return sequence
        raise ValueError("this sequence belongs to another engine")

    def _live(self, sequence: Sequence) -> DeviceSequence:
        mine = self._mine(sequence)
        if mine.released:
            raise ValueError("this sequence has been released")
        return mine
