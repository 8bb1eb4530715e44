"""Loading an official model folder, or one rank's part of it (deepseek-v4.md 0, 5.1, 6).

Strict: every tensor of the folder is used or named in an error. Lazy: a weight is read in blocks of
rows, only as far as this rank holds it, checked and converted at once into its place, so the peak
of memory is what stays plus a few buffers. FP8 and FP4 weights become the compute type here, which
is exact (model.formats).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from model.config import ModelConfig
from model.digest import Share, TensorSum, add_shares, finish
from model.formats import BadValueError, Fp4Decoder, Fp8Decoder, finite
from model.grid import Grid
from model.progress import Progress
from model.shards import Entry, Shards, named
from model.tensors import (
    FP4_GROUP,
    FP8_TILE,
    Expected,
    Kind,
    Precision,
    check_grid,
    expected_tensors,
    held_in_fp32,
    scale_name,
    stored_parts,
)
from penstock.errors import ModelLoadError

Bytes = npt.NDArray[np.uint8]
_EXPERT = re.compile(r"\.ffn\.experts\.\d+\.w[123]\.weight$")
_DENSE = ("attn.wq_a.weight", "attn.wq_b.weight", "attn.wkv.weight", "attn.wo_b.weight")
_FP4_DTYPES = ("I8", "U8", "F4")
_TORCH = {
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "I64": torch.int64,
    "I32": torch.int32,
}


@dataclass(frozen=True)
class Weights:
    """One rank's tensors by official name: FP8 and FP4 weights in the compute type, what is
    computed in fp32 in fp32, tables int64.
    """

    tensors: dict[str, Tensor]
    precision: Precision
    share: Share
    """This rank's part of the digest (model.digest)."""
    headers: tuple[tuple[str, str, tuple[int, ...]], ...]
    bytes_read: int

    @property
    def digest(self) -> str:
        """Digest of the whole checkpoint, if this rank has read all of it."""
        return self.digest_of([self.share])

    def digest_of(self, shares: list[Share]) -> str:
        """Digest of the whole checkpoint from the shares of all its ranks."""
        return finish(self.headers, add_shares(shares))


@dataclass(frozen=True)
class Checkpoint:
    """A folder whose headers fit its config. Nothing but headers has been read."""

    config: ModelConfig
    shards: Shards
    precision: Precision
    table: dict[str, Expected]
    """Every weight that is there, with its drafts."""
    has_drafts: bool

    @property
    def backbone(self) -> dict[str, Expected]:
        return {name: w for name, w in self.table.items() if not name.startswith("mtp.")}


def open_checkpoint(folder: Path | str, config: ModelConfig) -> Checkpoint:
    """Read and check all headers. One `ModelLoadError` sentence names everything that is wrong."""
    root = Path(folder)
    shards = Shards.open(root)
    found = shards.entries
    precision = precision_of(found)
    # A folder may come without its draft module, but not with a part of it.
    drafts = config.draft is not None and any(name.startswith("mtp.") for name in found)
    table = expected_tensors(config, precision, drafts=drafts)
    stored = {
        part: (kind, weight)
        for name, weight in table.items()
        for part, kind in stored_parts(name, weight).items()
    }
    problems: list[str] = []
    for name, entry in found.items():
        if name not in stored:
            problems.append(_unexpected(name, config, table))
            continue
        kind, _ = stored[name]
        shape = _shape_of(entry)
        if entry.dtype not in kind.dtypes:
            problems.append(f"{name} is {entry.dtype}, not {' or '.join(kind.dtypes)}")
        elif shape != kind.shape:
            problems.append(f"{name} is {list(shape)}, not {list(kind.shape)}")
    problems += [f"{name} is missing" for name in stored if name not in found]
    if problems:
        shards.close()
        raise ModelLoadError(f"{root} does not fit its config.json: {named(problems, 12)}")
    return Checkpoint(config, shards, precision, table, drafts)


def precision_of(entries: dict[str, Entry]) -> Precision:
    """Formats by the types that most experts and most dense linears are stored in (5.1, T21).

    `expert_dtype` of the config is not asked: the first release does not have it.
    """
    experts = _most(entry.dtype for name, entry in entries.items() if _EXPERT.search(name))
    dense = _most(entry.dtype for name, entry in entries.items() if name.endswith(_DENSE))
    kind = Kind.FP8 if dense == "F8_E4M3" else Kind.BF16
    if experts in _FP4_DTYPES:
        return Precision(kind, Kind.FP4)
    return Precision(kind, Kind.FP8 if experts == "F8_E4M3" else Kind.BF16)


def _most(dtypes: Iterable[str]) -> str:
    found = Counter(dtypes).most_common(1)
    return found[0][0] if found else ""


def _unexpected(name: str, config: ModelConfig, table: dict[str, Expected]) -> str:
    weight = name.removesuffix(".scale") + ".weight"
    if name.endswith(".scale") and weight in table:
        return f"{name} is unexpected because {weight} is not stored as FP8 or FP4"
    if name.startswith("mtp.") and config.draft is None:
        return f"{name} is unexpected because config.json names no draft module"
    return f"{name} is unexpected"


def _shape_of(entry: Entry) -> tuple[int, ...]:
    """F4 counts numbers; the release counts bytes of two numbers."""
    if entry.dtype == "F4" and entry.shape:
        return (*entry.shape[:-1], entry.shape[-1] // 2)
    return entry.shape


def load_weights(
    folder: Path | str,
    config: ModelConfig,
    *,
    dtype: torch.dtype = torch.float32,
    grid: Grid | None = None,
    drafts: bool = False,
) -> Weights:
    """Open the folder and read one rank's part. See `open_checkpoint` and `read_weights`."""
    checkpoint = open_checkpoint(folder, config)
    with checkpoint.shards:
        check_grid(config, grid or Grid())
        return read_weights(checkpoint, dtype=dtype, grid=grid or Grid(), drafts=drafts)


def read_weights(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype,
    grid: Grid,
    drafts: bool = False,
    progress: Progress | None = None,
) -> Weights:
    """Read what this rank holds. Raises `ModelLoadError` that names the first bad tensor.

    `drafts`: also the draft module, if the folder has one.
    """
    shards, config = checkpoint.shards, checkpoint.config
    table = checkpoint.table if drafts else checkpoint.backbone
    entries = shards.entries
    order = sorted(table, key=lambda name: (entries[name].path, entries[name].at))
    tensors: dict[str, Tensor] = {}
    shares: list[Share] = []
    for name in order:
        weight = table[name]
        part = weight.slices(grid)
        if part is None:
            continue
        reader = _Reader(shards, name, weight, part, dtype, hashed=_counts(weight, part, grid))
        try:
            tensors[name] = reader.read(config, progress)
        except BadValueError as error:
            raise ModelLoadError(
                f"{shards.root} cannot be served: {name} {error}; get the file "
                f"{entries[name].path.name} again"
            ) from None
        shares += reader.shares
    headers = tuple(
        (stored, entries[stored].dtype, entries[stored].shape)
        for name in table
        for stored in stored_parts(name, table[name])
    )
    return Weights(tensors, checkpoint.precision, add_shares(shares), headers, shards.bytes_read)


def stored_bytes(checkpoint: Checkpoint, table: dict[str, Expected], grid: Grid) -> int:
    """Bytes of the weights that a rank keeps, without scales: the end of the progress bar."""
    total = 0
    for name, weight in table.items():
        shape = weight.local_shape(grid)
        if shape is not None:
            kept = checkpoint.shards.entries[name].size_bytes
            for mine, whole in zip(shape, weight.shape, strict=True):
                kept = kept * mine // whole
            total += kept
    return total


def _counts(weight: Expected, part: tuple[slice, ...], grid: Grid) -> bool:
    """Whether this rank adds the part to the digest: the first of its plane that holds it."""
    before = (replace(grid, rank=rank) for rank in range(grid.plane_rank))
    return all(weight.slices(other) != part for other in before)


class _Reader:
    """Reads one weight's part into its final tensor."""

    def __init__(
        self,
        shards: Shards,
        name: str,
        weight: Expected,
        part: tuple[slice, ...],
        dtype: torch.dtype,
        *,
        hashed: bool,
    ) -> None:
        self._shards, self._name, self._weight, self._part = shards, name, weight, part
        self._dtype = torch.float32 if held_in_fp32(name, weight) else dtype
        self._hashed = hashed
        self.shares: list[Share] = []

    def read(self, config: ModelConfig, progress: Progress | None) -> Tensor:
        entry = self._shards.entries[self._name]
        weight, part = self._weight, self._part
        convert: Callable[[Bytes, int], Tensor]
        match weight.kind:
            case Kind.FP8:
                convert = Fp8Decoder(
                    self._scales(FP8_TILE, FP8_TILE),
                    self._dtype,
                    row=part[0].start,
                    column=part[1].start,
                )
            case Kind.FP4:
                convert = Fp4Decoder(self._scales(1, FP4_GROUP), self._dtype, column=part[1].start)
            case Kind.INT64:
                convert = _table_of(entry, config.experts)
            case _:
                convert = _plain(entry)
        shape = tuple(piece.stop - piece.start for piece in part)
        kept = torch.int64 if weight.kind is Kind.INT64 else self._dtype
        out = torch.empty(shape, dtype=kept)
        columns = part[1] if len(part) > 1 else slice(0, 1)
        width = weight.shape[1] if len(part) > 1 else 1
        at = slice(
            columns.start * entry.row_bytes // width, columns.stop * entry.row_bytes // width
        )
        total = self._sum(self._name, entry.row_bytes)
        first = part[0].start
        for row, raw in self._shards.blocks(entry, first, part[0].stop):
            mine = raw[:, at]
            if total is not None:
                total.add(mine, row=row, byte=at.start)
            values = convert(mine, row - first)
            out[row - first : row - first + len(raw)] = values.view(len(raw), *shape[1:])
            if progress is not None:
                progress.add(mine.size)
        if total is not None:
            self.shares.append(tuple(total.share))
        return out

    def _sum(self, name: str, row_bytes: int) -> TensorSum | None:
        if not self._hashed:
            return None
        return TensorSum(name, row_bytes)

    def _scales(self, tile_rows: int, tile_columns: int) -> Bytes:
        """Scale codes of every tile that the part touches."""
        name = scale_name(self._name)
        entry = self._shards.entries[name]
        rows, columns = (
            slice(piece.start // tile, -(-piece.stop // tile))
            for piece, tile in zip(self._part, (tile_rows, tile_columns), strict=True)
        )
        raw = self._shards.rows(entry, rows.start, rows.stop)[:, columns]
        total = self._sum(name, entry.row_bytes)
        if total is not None:
            # A tile that a cut goes through counts where it begins.
            top, left = (
                int(piece.start % tile > 0)
                for piece, tile in zip(self._part, (tile_rows, tile_columns), strict=True)
            )
            total.add(raw[top:, left:], row=rows.start + top, byte=columns.start + left)
            self.shares.append(tuple(total.share))
        return np.ascontiguousarray(raw)


def _plain(entry: Entry) -> Callable[[Bytes, int], Tensor]:
    """bf16 or fp32 as stored."""

    def convert(raw: Bytes, first: int) -> Tensor:
        values = torch.from_numpy(np.ascontiguousarray(raw)).view(_TORCH[entry.dtype])
        if not finite(values):
            raise BadValueError("has values that are not finite")
        return values

    return convert


def _table_of(entry: Entry, experts: int) -> Callable[[Bytes, int], Tensor]:
    """Expert numbers of a hash layer."""

    def convert(raw: Bytes, first: int) -> Tensor:
        values = torch.from_numpy(np.ascontiguousarray(raw)).view(_TORCH[entry.dtype])
        if values.numel() and not (int(values.min()) >= 0 and int(values.max()) < experts):
            raise BadValueError(f"names experts outside 0..{experts - 1}")
        return values

    return convert
