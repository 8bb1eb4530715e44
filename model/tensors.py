"""The tensor table of a checkpoint: name, shape, stored format, and how it is cut over ranks
(deepseek-v4.md 1.6, 1.7, 5.1, 6). Torch-free.

Shapes are logical ([outputs, inputs]); `stored_parts` says what a file holds for them: FP4 packs
two inputs a byte, and FP8 and FP4 weights have a scale tensor beside them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from model.config import CSA_RATIO, DraftConfig, DraftKind, ModelConfig
from model.grid import Grid
from penstock.errors import ModelLoadError

FP8_TILE = 128
"""An FP8 weight has one scale per tile of 128 x 128."""
FP4_GROUP = 32
"""An FP4 weight has one scale per 32 inputs of a row."""


class Kind(StrEnum):
    """How the numbers of a tensor are stored."""

    BF16 = "bf16"
    FP32 = "fp32"
    INT64 = "int64"
    FP8 = "fp8"
    """e4m3, scales e8m0 per 128 x 128."""
    FP4 = "fp4"
    """e2m1, two a byte, scales e8m0 per 1 x 32."""

    @property
    def scaled(self) -> bool:
        return self in (Kind.FP8, Kind.FP4)


class Cut(StrEnum):
    """Which part of a tensor a rank holds; `Expected.slices` turns it into ranges.

    A matrix is cut by its outputs only: every output is one sum over all inputs on one rank.
    """

    WHOLE = "whole"
    ROWS = "rows"
    """Outputs over the plane's tp * ep ranks, in order of the plane rank."""
    EXPERT_ROWS = "expert_rows"
    """An expert of this ep rank; its outputs over tp."""
    VOCABULARY = "vocabulary"
    """Outputs over the plane if it divides them, else whole: the ranks' logits are gathered."""


@dataclass(frozen=True)
class Precision:
    """Formats of a checkpoint's linears (5.1). Found by the stored dtype, not by config keys."""

    dense: Kind
    experts: Kind

    @property
    def quantised(self) -> bool:
        return self.dense.scaled or self.experts.scaled


PLAIN = Precision(Kind.BF16, Kind.BF16)
RELEASED = Precision(Kind.FP8, Kind.FP4)
BASE = Precision(Kind.FP8, Kind.FP8)


@dataclass(frozen=True)
class Stored:
    """One tensor of a file."""

    shape: tuple[int, ...]
    dtypes: tuple[str, ...]
    """Accepted names of the safetensors header."""


@dataclass(frozen=True)
class Expected:
    """What the config says a weight must be. `shape` is logical."""

    shape: tuple[int, ...]
    kind: Kind = Kind.BF16
    cut: Cut = Cut.WHOLE
    expert: int | None = None
    """Number of the routed expert that it belongs to."""
    experts: int = 0
    """Routed experts of that layer (0 where `expert` is None)."""

    @property
    def numbers(self) -> int:
        total = 1
        for size in self.shape:
            total *= size
        return total

    def slices(self, grid: Grid) -> tuple[slice, ...] | None:
        """This rank's part as one range per dimension of the logical shape; None if it holds none.

        The grid must fit the config (`check_grid`).
        """
        whole = tuple(slice(0, size) for size in self.shape)
        match self.cut:
            case Cut.WHOLE:
                return whole
            case Cut.VOCABULARY:
                uneven = self.shape[0] % grid.plane
                return whole if uneven else _cut(whole, grid.plane, grid.plane_rank)
            case Cut.ROWS:
                return _cut(whole, grid.plane, grid.plane_rank)
            case Cut.EXPERT_ROWS:
                assert self.expert is not None
                if self.expert not in local_experts(self.experts, grid):
                    return None
                return _cut(whole, grid.tp, grid.tp_rank)

    def local_shape(self, grid: Grid) -> tuple[int, ...] | None:
        """Shape of this rank's part."""
        parts = self.slices(grid)
        return None if parts is None else tuple(part.stop - part.start for part in parts)


def _cut(whole: tuple[slice, ...], ways: int, which: int) -> tuple[slice, ...]:
    size = whole[0].stop // ways
    return (slice(which * size, (which + 1) * size), *whole[1:])


def local_experts(experts: int, grid: Grid) -> range:
    """Numbers of the routed experts that this rank holds: consecutive ones, by ep rank."""
    each = experts // grid.ep
    return range(grid.ep_rank * each, (grid.ep_rank + 1) * each)


def check_grid(config: ModelConfig, grid: Grid) -> None:
    """Raise `ModelLoadError` with the numbers if the model cannot be cut this way."""
    c = config
    tensor = f"tensor parallel {grid.tp}"
    plane = f"{grid.plane} ranks ({tensor} x expert parallel {grid.ep})"
    wrong = []
    sharers = max(grid.plane // c.o_groups, 1)
    if c.heads % grid.plane or (c.o_groups % grid.plane and grid.plane % c.o_groups):
        wrong.append(
            f"{c.heads} heads in {c.o_groups} output groups (o_groups) cannot be cut over {plane}"
        )
    elif c.o_rank % sharers:
        wrong.append(
            f"{c.o_rank} outputs of a group (o_lora_rank) cannot be cut over {sharers} ranks"
        )
    if c.experts % grid.ep:
        wrong.append(
            f"{c.experts} routed experts (n_routed_experts) cannot be cut over expert parallel "
            f"{grid.ep}"
        )
    for size, what in (
        (c.expert_width, f"the expert width {c.expert_width} (moe_intermediate_size)"),
        (c.hidden, f"the model width {c.hidden} (hidden_size)"),
    ):
        for ways, who in ((grid.tp, tensor), (grid.plane, plane)):
            if size % ways:
                wrong.append(f"{what} cannot be cut over {who}")
                break
    if wrong:
        raise ModelLoadError(f"the model does not fit these ranks: {'; '.join(wrong)}")


def expected_tensors(
    config: ModelConfig, precision: Precision = PLAIN, *, drafts: bool = False
) -> dict[str, Expected]:
    """Every weight by its official name, without scale tensors; `mtp.*` only with `drafts`."""
    return dict(_backbone(config, precision)) | (dict(_drafts(config, precision)) if drafts else {})


def stored_parts(name: str, weight: Expected) -> dict[str, Stored]:
    """What the files hold for one weight: itself and, if it is FP8 or FP4, its scales.

    An unquantised float may be bf16 or fp32: either is exact.
    """
    match weight.kind:
        case Kind.INT64:
            return {name: Stored(weight.shape, ("I64", "I32"))}
        case Kind.BF16 | Kind.FP32:
            return {name: Stored(weight.shape, ("BF16", "F32"))}
    rows, columns = weight.shape
    if weight.kind is Kind.FP8:
        codes = Stored((rows, columns), ("F8_E4M3",))
        scales = (-(-rows // FP8_TILE), -(-columns // FP8_TILE))
    else:
        codes = Stored((rows, columns // 2), ("I8", "U8", "F4"))
        scales = (rows, columns // FP4_GROUP)
    return {name: codes, scale_name(name): Stored(scales, ("F8_E8M0",))}


def scale_name(name: str) -> str:
    return name.removesuffix(".weight") + ".scale"


def held_in_fp32(name: str, weight: Expected) -> bool:
    """What is computed in fp32 is kept so: norms, mHC, sinks, router, compressors, head (1.3)."""
    return (
        weight.kind is Kind.FP32
        or len(weight.shape) == 1
        or "compressor." in name
        or name.endswith(".gate.weight")
        or name == "head.weight"
    )


def parameters(table: dict[str, Expected]) -> int:
    """Numbers in all float weights of the table (hash tables are no parameters)."""
    return sum(weight.numbers for weight in table.values() if weight.kind is not Kind.INT64)


Rows = Iterator[tuple[str, Expected]]


def _backbone(c: ModelConfig, precision: Precision) -> Rows:
    # The head is most of what a small batch reads: it is cut where the vocabulary allows it.
    yield "embed.weight", Expected((c.vocab_size, c.hidden))
    yield "head.weight", Expected((c.vocab_size, c.hidden), cut=Cut.VOCABULARY)
    yield "norm.weight", Expected((c.hidden,))
    yield from _head_collapse(c, "")
    for layer, ratio in enumerate(c.ratios):
        yield from _block(c, precision, f"layers.{layer}.", ratio, hashed=layer < c.hash_layers)


def _drafts(c: ModelConfig, precision: Precision) -> Rows:
    draft = c.draft
    if draft is None:
        return
    for stage in range(draft.stages):
        name = f"mtp.{stage}."
        yield from _block(c, precision, name, 0, hashed=False)
        if draft.kind is DraftKind.MTP:
            yield from _mtp_parts(c, precision, name)
        else:
            yield from _dspark_parts(c, draft, precision, name, stage)


def _mtp_parts(c: ModelConfig, precision: Precision, name: str) -> Rows:
    """1.6: the embedding and the head are the backbone's."""
    for part in ("e_proj", "h_proj"):
        yield f"{name}{part}.weight", Expected((c.hidden, c.hidden), precision.dense)
    for part in ("enorm", "hnorm", "norm"):
        yield f"{name}{part}.weight", Expected((c.hidden,))
    yield from _head_collapse(c, name)


def _dspark_parts(
    c: ModelConfig, draft: DraftConfig, precision: Precision, name: str, stage: int
) -> Rows:
    """1.7: the first stage reads the target layers, the last one speaks."""
    if stage == 0:
        wide = len(draft.target_layers) * c.hidden
        yield name + "main_proj.weight", Expected((c.hidden, wide), precision.dense)
        yield name + "main_norm.weight", Expected((c.hidden,))
    if stage == draft.stages - 1:
        yield name + "norm.weight", Expected((c.hidden,))
        yield from _head_collapse(c, name)
        for part in ("markov_w1", "markov_w2"):
            yield f"{name}markov_head.{part}.weight", Expected((c.vocab_size, draft.markov_rank))
        wide = c.hidden + draft.markov_rank
        yield name + "confidence_head.proj.weight", Expected((1, wide), Kind.FP32)


def _head_collapse(c: ModelConfig, name: str) -> Rows:
    yield name + "hc_head_fn", Expected((c.streams, c.streams * c.hidden), Kind.FP32)
    yield name + "hc_head_base", Expected((c.streams,), Kind.FP32)
    yield name + "hc_head_scale", Expected((1,), Kind.FP32)


def _block(c: ModelConfig, precision: Precision, name: str, ratio: int, *, hashed: bool) -> Rows:
    yield name + "attn_norm.weight", Expected((c.hidden,))
    yield name + "ffn_norm.weight", Expected((c.hidden,))
    mixes = c.streams * (c.streams + 2)
    for part in ("attn", "ffn"):
        yield f"{name}hc_{part}_fn", Expected((mixes, c.streams * c.hidden), Kind.FP32)
        yield f"{name}hc_{part}_base", Expected((mixes,), Kind.FP32)
        yield f"{name}hc_{part}_scale", Expected((3,), Kind.FP32)
    yield from _attention(c, precision.dense, name + "attn.", ratio)
    yield from _experts(c, precision, name + "ffn.", hashed=hashed)


def _attention(c: ModelConfig, dense: Kind, name: str, ratio: int) -> Rows:
    """Heads and output groups are cut alike: a rank owns whole groups and their heads (T24), or,
    with fewer groups than ranks, some heads and some outputs of one group.
    """
    yield name + "wq_a.weight", Expected((c.q_rank, c.hidden), dense)
    yield name + "q_norm.weight", Expected((c.q_rank,))
    yield name + "wq_b.weight", Expected((c.heads * c.head_dim, c.q_rank), dense, Cut.ROWS)
    yield name + "wkv.weight", Expected((c.head_dim, c.hidden), dense)
    yield name + "kv_norm.weight", Expected((c.head_dim,))
    wide = c.heads // c.o_groups * c.head_dim
    yield (
        name + "wo_a.weight",
        Expected((c.o_groups * c.o_rank, wide), dense, Cut.ROWS),
    )
    yield name + "wo_b.weight", Expected((c.hidden, c.o_groups * c.o_rank), dense, Cut.ROWS)
    yield name + "attn_sink", Expected((c.heads,), Kind.FP32, Cut.ROWS)
    if ratio:
        yield from _compressor(c.hidden, name + "compressor.", ratio, c.head_dim)
    if ratio == CSA_RATIO:
        wide = c.index_heads * c.index_dim
        yield name + "indexer.wq_b.weight", Expected((wide, c.q_rank), dense)
        yield name + "indexer.weights_proj.weight", Expected((c.index_heads, c.hidden))
        yield from _compressor(c.hidden, name + "indexer.compressor.", ratio, c.index_dim)


def _compressor(hidden: int, name: str, ratio: int, dim: int) -> Rows:
    wide = dim * (2 if ratio == CSA_RATIO else 1)
    yield name + "ape", Expected((ratio, wide), Kind.FP32)
    yield name + "wkv.weight", Expected((wide, hidden))
    yield name + "wgate.weight", Expected((wide, hidden))
    yield name + "norm.weight", Expected((dim,))


def _experts(c: ModelConfig, precision: Precision, name: str, *, hashed: bool) -> Rows:
    """The router stays unquantised, and its bias is called `gate.bias` (T10)."""
    yield name + "gate.weight", Expected((c.experts, c.hidden))
    if hashed:
        yield name + "gate.tid2eid", Expected((c.vocab_size, c.active_experts), Kind.INT64)
    else:
        yield name + "gate.bias", Expected((c.experts,), Kind.FP32)
    up, down = (c.expert_width, c.hidden), (c.hidden, c.expert_width)
    for expert in range(c.experts):
        part = f"{name}experts.{expert}."
        own = (expert, c.experts)
        yield part + "w1.weight", Expected(up, precision.experts, Cut.EXPERT_ROWS, *own)
        yield part + "w2.weight", Expected(down, precision.experts, Cut.EXPERT_ROWS, *own)
        yield part + "w3.weight", Expected(up, precision.experts, Cut.EXPERT_ROWS, *own)
    part = name + "shared_experts."
    yield part + "w1.weight", Expected(up, precision.dense, Cut.ROWS)
    yield part + "w2.weight", Expected(down, precision.dense, Cut.ROWS)
    yield part + "w3.weight", Expected(up, precision.dense, Cut.ROWS)
