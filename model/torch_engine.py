"""`TorchEngine`: the `Engine` contract on torch (deepseek-v4.md; architecture.md, "Numerics
classes").

`forward` cuts its segments into passes of at most `PASS_ROWS` rows, and at every position whose
state is wanted: in class `exact` a cut changes nothing, so any cut is allowed.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from kernels import ops as kernel_ops
from model.cache import SequenceCache, cache_bytes
from model.codec import RowCodec
from model.config import CSA_RATIO, ModelConfig
from model.drafts.drafter import Asked
from model.drafts.plan import DraftPlan
from model.engine import (
    SEEKABLE_TOKENS,
    Buffer,
    DraftCost,
    DraftRequest,
    EngineInfo,
    Evidence,
    Segment,
    SegmentResult,
    Sequence,
)
from model.exact import check_machine
from model.layout import cache_layout
from model.network import Chunk, Network
from model.options import DTYPES, EngineOptions, fingerprint_facts
from model.ranks.communicator import Communicator, alone
from model.replay import check_replay, replay_tokens
from model.rows import Span
from penstock.blocks import BLOCK_TOKENS
from penstock.identity import fingerprint

PASS_ROWS = 1024


class TorchLogits:
    """Rows of a [R, V] fp32 tensor."""

    def __init__(self, rows_RV: Tensor) -> None:
        self._rows = rows_RV.contiguous().numpy()

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, index: int) -> memoryview:
        return memoryview(self._rows[index]).toreadonly()


class TorchEngine:
    """See the module. One thread at a time; starts none itself."""

    def __init__(
        self,
        config: ModelConfig,
        tensors: dict[str, Tensor],
        *,
        weights_digest: str,
        options: EngineOptions,
        ops: kernel_ops.ReferenceOps,
        rounded: frozenset[str] = frozenset(),
        drafts: DraftPlan | None = None,
        comm: Communicator | None = None,
    ) -> None:
        """`tensors` are the parts of `comm`'s rank; None: one rank alone."""
        self._comm = comm or alone()
        self._config, self._drafts = config, drafts
        index = options.rounding.index_rows
        dtype = DTYPES[options.dtype]
        widths = (config.hidden, config.head_dim, config.rope_dim)
        keys = (config.index_dim,) if config.last_csa_layer is not None else ()
        ops = kernel_ops.suited(
            ops,
            dtype,
            streams=config.streams,
            channels=(*widths, *keys),
            exact=options.numerics == "exact",
        )
        self._codec = RowCodec(config, options.kv, ops, index=index)
        self._layout = cache_layout(config, options.kv, drafts, index=index)
        row_tile = None
        # Native kernels compute each row alone: there is nothing to check.
        if options.numerics == "exact" and ops.row_multiple > 1:
            row_tile = check_machine(config, tensors, dtype, self._comm.grid)
        with torch.inference_mode():
            self._network = Network(
                config,
                tensors,
                ops=ops,
                codec=self._codec,
                dtype=dtype,
                row_tile=row_tile,
                rounding=options.rounding,
                rounded=rounded,
                drafts=drafts,
                comm=self._comm,
            )
        self._threads = torch.get_num_threads() if options.numerics == "exact" else None
        self._owner = object()
        self._open: dict[int, SequenceCache] = {}
        self._info = EngineInfo(
            fingerprint=fingerprint(
                fingerprint_facts(
                    config,
                    options,
                    weights_digest,
                    self._layout.to_json(),
                    ops.name,
                    row_tile,
                    self._comm.grid,
                )
            ),
            layout=self._layout,
            vocab_size=config.vocab_size,
            max_model_len=options.max_model_len,
            eos_token_ids=config.eos_token_ids,
            numerics=options.numerics,
            description=(
                f"torch {torch.__version__} cpu, {config.layers} layers, kv {options.kv.value}, "
                f"{options.dtype}"
            ),
            draft_tokens=drafts.tokens if drafts else 0,
            draft_cost=drafts.cost(config.layers) if drafts else DraftCost(),
            replay_tokens=replay_tokens(config, drafts) if options.numerics == "exact" else 0,
        )

    @property
    def info(self) -> EngineInfo:
        return self._info

    @property
    def open_sequences(self) -> int:
        return len(self._open)

    def bytes_for(self, tokens: int) -> int:
        return cache_bytes(self._config, tokens, self._drafts)

    def open(self, capacity: int) -> SequenceCache:
        if not 0 < capacity <= self._info.max_model_len:
            raise ValueError(f"capacity {capacity} is outside 1..{self._info.max_model_len}")
        sequence = SequenceCache(self._config, capacity, owner=self._owner, drafts=self._drafts)
        self._open[id(sequence)] = sequence
        return sequence

    @torch.inference_mode()
    def grow(self, sequence: Sequence, capacity: int) -> None:
        mine = self._live(sequence)
        if not mine.capacity <= capacity <= self._info.max_model_len:
            raise ValueError(
                f"capacity {capacity} is outside {mine.capacity}..{self._info.max_model_len}"
            )
        mine.grow(capacity)

    def release(self, sequence: Sequence) -> None:
        mine = self._mine(sequence)
        mine.release()
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
        mine.load_block(self._layout, self._codec, index, memoryview(payload))

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
        mine.load_state(self._layout, self._codec, position, memoryview(payload))

    @torch.inference_mode()
    def replay(self, sequence: Sequence, start: int) -> None:
        mine = self._live(sequence)
        check_replay(self._info, start, position=mine.position, blocks=mine.loaded_blocks)
        mine.replay(start)

    @torch.inference_mode()
    def forward(self, segments: Seq[Segment]) -> list[SegmentResult]:
        self._pin_threads()
        work = [self._checked(segment) for segment in segments]
        if len({id(item.cache) for item in work}) != len(work):
            raise ValueError("a sequence appears in two segments of one forward")
        results = [SegmentResult() for _ in work]
        pending = [item for item in work if item.tokens]
        for item in pending:
            item.cache.leave_trail(len(item.tokens) if item.seekable else None)
        while pending:
            chunks = _shared_pass(pending[0], self._comm.grid.cp)
            if not chunks or self._network.share_of(chunks) is None:
                chunks = _next_pass(pending)
            asking = [next(w for w in pending if w.cache is chunk.span.cache) for chunk in chunks]
            every = any(item.all_logits or item.seekable for item in asking)
            hidden = self._network.forward(chunks, every=every)
            for chunk, item in zip(chunks, asking, strict=True):
                item.done += chunk.span.count
                if item.cache.position in item.states_at:
                    state = item.cache.export_state(self._layout, self._codec)
                    results[work.index(item)].states[item.cache.position] = state
            self._add_logits(hidden, chunks, asking)
            pending = [item for item in pending if item.done < len(item.tokens)]
        return [
            SegmentResult(
                result.states, TorchLogits(torch.cat(item.logits)) if item.logits else None
            )
            for item, result in zip(work, results, strict=True)
        ]

    def _add_logits(self, hidden: Tensor, chunks: list[Chunk], asking: list[_Work]) -> None:
        """One product with the head for all rows of a pass that owe their logits."""
        owing = [(c.span, w) for c, w in zip(chunks, asking, strict=True) if w.all_logits]
        if not owing:
            return
        logits = self._network.logits(torch.cat([hidden[span.rows] for span, _ in owing]))
        parts = torch.split(logits, [span.count for span, _ in owing])
        for part, (_, item) in zip(parts, owing, strict=True):
            item.logits.append(part)

    @torch.inference_mode()
    def seek(self, sequence: Sequence, position: int) -> None:
        self._live(sequence).seek(position)

    @torch.inference_mode()
    def draft(self, requests: Seq[DraftRequest]) -> list[list[int]]:
        self._pin_threads()
        most = self._info.draft_tokens
        asked = [Asked(self._live(request.sequence), request) for request in requests]
        for item in asked:
            if item.cache.position < 1 or not 0 <= item.request.count <= most:
                raise ValueError(f"a draft needs a position of at least 1 and 0..{most} tokens")
            if not 0 <= item.request.token < self._config.vocab_size:
                raise ValueError(f"token {item.request.token} is outside the vocabulary")
        asking = [item for item in asked if item.request.count]
        drafts = iter(self._network.draft(asking) if asking else [])
        return [next(drafts) if item.request.count else [] for item in asked]

    @torch.inference_mode()
    def export_block(self, sequence: Sequence, index: int) -> bytes:
        mine = self._live(sequence)
        if index < 0 or (index + 1) * BLOCK_TOKENS > mine.position:
            raise ValueError(f"block {index} is not complete at position {mine.position}")
        return mine.export_block(self._layout, self._codec, index)

    @torch.inference_mode()
    def export_state(self, sequence: Sequence) -> bytes:
        mine = self._live(sequence)
        if mine.position < 1:
            raise ValueError("an empty sequence has no state")
        return mine.export_state(self._layout, self._codec)

    @torch.inference_mode()
    def logits(self, sequences: Seq[Sequence]) -> TorchLogits:
        self._pin_threads()
        mine = [self._live(sequence) for sequence in sequences]
        if any(sequence.position < 1 for sequence in mine):
            raise ValueError("an empty sequence has no next-token logits")
        if not mine:
            return TorchLogits(torch.empty((0, self._config.vocab_size)))
        return TorchLogits(self._network.logits(torch.stack([s.hidden_D for s in mine])))

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
        for sequence in self._open.values():
            sequence.release()
        self._open.clear()
        self._comm.close()

    def _pin_threads(self) -> None:
        """torch counts threads per calling thread: one that used torch before, or a second engine
        opened in it, would split products in a way that the start-up check has not seen.
        """
        if self._threads is not None and torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)

    def _mine(self, sequence: Sequence) -> SequenceCache:
        if isinstance(sequence, SequenceCache) and sequence.owner is self._owner:
            return sequence
        raise ValueError("this sequence belongs to another engine")

    def _live(self, sequence: Sequence) -> SequenceCache:
        mine = self._mine(sequence)
        if mine.released:
            raise ValueError("this sequence has been released")
        return mine

    def _checked(self, segment: Segment) -> _Work:
        mine = self._live(segment.sequence)
        tokens = list(segment.tokens)
        end = mine.position + len(tokens)
        if end > mine.capacity:
            raise ValueError(
                f"{len(tokens)} tokens at position {mine.position} exceed the capacity "
                f"{mine.capacity}"
            )
        if tokens and not (min(tokens) >= 0 and max(tokens) < self._config.vocab_size):
            raise ValueError(f"a token id is outside the vocabulary of {self._config.vocab_size}")
        wanted = segment.states_at
        ascending = all(a < b for a, b in pairwise(wanted))
        if wanted and not (ascending and mine.position < wanted[0] and wanted[-1] <= end):
            raise ValueError(f"states_at {wanted} must ascend inside ({mine.position}, {end}]")
        if wanted and wanted[0] < mine.replays_until:
            raise ValueError(f"a replay has no exact state before {mine.replays_until}")
        if segment.seekable and (wanted or len(tokens) > SEEKABLE_TOKENS):
            raise ValueError(
                f"a seekable segment has at most {SEEKABLE_TOKENS} tokens and no states_at"
            )
        return _Work(mine, tokens, wanted, segment.all_logits, segment.seekable)


@dataclass
class _Work:
    """A segment under way: `done` of its tokens are absorbed."""

    cache: SequenceCache
    tokens: list[int]
    states_at: tuple[int, ...]
    all_logits: bool
    seekable: bool
    done: int = 0
    logits: list[Tensor] = field(default_factory=list)

    def take(self, budget: int) -> list[int]:
        """Next tokens: within the budget, and not beyond the next wanted state."""
        position = self.cache.position
        stop = next((p - position for p in self.states_at if p > position), budget)
        return self.tokens[self.done : self.done + min(budget, stop)]


def _shared_pass(item: _Work, planes: int) -> list[Chunk]:
    """One sequence's next rows, as many as all planes together may compute in one pass."""
    if planes == 1:
        return []
    tokens = item.take(PASS_ROWS * planes)
    return [Chunk(Span(item.cache, 0, len(tokens), item.cache.position), tokens)]


def _next_pass(pending: list[_Work]) -> list[Chunk]:
    """Chunks of up to `PASS_ROWS` rows, every sequence at most once."""
    chunks: list[Chunk] = []
    row = 0
    for item in pending:
        # A seekable segment stays whole: its trail is that of one pass.
        if row >= PASS_ROWS or (item.seekable and row + len(item.tokens) > PASS_ROWS):
            break
        tokens = item.take(PASS_ROWS - row)
        chunks.append(Chunk(Span(item.cache, row, len(tokens), item.cache.position), tokens))
        row += len(tokens)
    return chunks
