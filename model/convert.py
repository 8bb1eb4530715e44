"""Repack a released checkpoint: `python -m model.convert IN OUT --expert-dtype fp8`.

FP4 experts become FP8 with 128 x 128 scales without loss (deepseek-v4.md 5.1): a tile's scale is
its largest FP4 scale / 64, so the largest weight, 6 * 64 = 384, is below e4m3's 448, and each code
takes the ratio of its own scale to the tile's. That is exact while the scales of a tile lie within
2^14 of one another; a tile where it is not is refused by name, never rounded.

The folder is written file by file and tensor by tensor: memory stays below a few buffers.

Shape suffixes: N outputs, K inputs, B bytes of a row, G scale columns.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import torch

from model.config import ModelConfig
from model.formats import BadValueError, fp4_table, scale_values
from model.progress import Progress
from model.shards import INDEX_FILE, Entry
from model.tensors import FP4_GROUP, FP8_TILE, Kind, scale_name
from model.weights import Checkpoint, open_checkpoint
from penstock.errors import ModelLoadError, PenstockError

Bytes = npt.NDArray[np.uint8]
_TILE_HEADROOM = 6
"""log2 of the factor between a tile's largest FP4 scale and its FP8 scale."""


def repack(codes_NB: Bytes, scales_NG: Bytes) -> tuple[Bytes, Bytes]:
    """e4m3 codes [N, 2 B] and e8m0 scales per 128 x 128 of the same numbers as these FP4 ones.

    Raises `BadValueError` where e4m3 cannot hold a tile's numbers.
    """
    rows, width = codes_NB.shape[0], 2 * codes_NB.shape[1]
    per_tile = FP8_TILE // FP4_GROUP
    high, wide = -(-rows // FP8_TILE), -(-scales_NG.shape[1] // per_tile)
    scale_values(scales_NG, torch.float32)
    padded = np.zeros((high * FP8_TILE, wide * per_tile), np.int32)
    padded[:rows, : scales_NG.shape[1]] = scales_NG
    tiles = padded.reshape(high, FP8_TILE, wide, per_tile).max((1, 3))
    tiles = np.maximum(tiles - _TILE_HEADROOM, 0)
    own = np.repeat(np.repeat(tiles, FP8_TILE, 0)[:rows], per_tile, 1)[:, : scales_NG.shape[1]]
    # Below 2^-126 no code but 0 can stand for anything: the check that follows refuses it.
    ratio = torch.from_numpy((scales_NG.astype(np.int32) - own).clip(-126, 127))
    values = fp4_table(torch.float32)[torch.from_numpy(codes_NB).long()].view(rows, -1, FP4_GROUP)
    wanted = values * ((ratio + 127) << 23).view(torch.float32)[:, :, None]
    codes = wanted.to(torch.float8_e4m3fn)
    if not torch.equal(codes.float(), wanted):
        raise BadValueError("has FP4 scales too far apart in one 128 x 128 tile for FP8")
    return codes.view(torch.uint8).view(rows, width).numpy(), tiles.astype(np.uint8)


def convert(source: Path, target: Path) -> int:
    """Write `target` as `source` with FP8 experts. Returns the number of repacked weights.

    Raises `ModelLoadError`; `target` must be empty or not exist.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ModelLoadError(f"{target} is not an empty folder; name another one")
    checkpoint = open_checkpoint(source, ModelConfig.load(source))
    with checkpoint.shards as shards:
        fp4 = {name for name, weight in checkpoint.table.items() if weight.kind is Kind.FP4}
        if not fp4:
            raise ModelLoadError(f"{source} has no FP4 experts; there is nothing to repack")
        target.mkdir(parents=True, exist_ok=True)
        total = sum(entry.size_bytes for entry in shards.entries.values())
        with Progress(f"Repacking {source.name}", total) as progress:
            for file in sorted({entry.path for entry in shards.entries.values()}):
                _File(checkpoint, file, fp4, progress).write(target / file.name)
    _copy_rest(source, target)
    return len(fp4)


class _File:
    """One file of the checkpoint and its copy."""

    def __init__(
        self, checkpoint: Checkpoint, path: Path, fp4: set[str], progress: Progress
    ) -> None:
        self._shards, self._progress = checkpoint.shards, progress
        held = {n: e for n, e in checkpoint.shards.entries.items() if e.path == path}
        self._entries = dict(sorted(held.items(), key=lambda item: item[1].at))
        self._fp4 = fp4
        self._weight_of = {scale_name(name): name for name in fp4}
        # A weight and its scale usually lie side by side.
        self._last: tuple[str, tuple[Bytes, Bytes]] | None = None

    def write(self, path: Path) -> None:
        header: dict[str, object] = {}
        at = 0
        for name, entry in self._entries.items():
            dtype, shape, size = self._layout(name, entry)
            offsets = [at, at + size]
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
            at += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        part = path.with_suffix(".part")
        with part.open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for name, entry in self._entries.items():
                self._copy(name, entry, out)
        part.rename(path)

    def _layout(self, name: str, entry: Entry) -> tuple[str, list[int], int]:
        """Type, shape and bytes in the copy."""
        if name in self._fp4:
            # I8 and U8 count bytes of two numbers, F4 counts numbers; all end at these bytes.
            shape = [entry.rows, 2 * entry.row_bytes]
            return "F8_E4M3", shape, shape[0] * shape[1]
        if name in self._weight_of:
            weight = self._shards.entries[self._weight_of[name]]
            shape = [-(-weight.rows // FP8_TILE), -(-2 * weight.row_bytes // FP8_TILE)]
            return "F8_E8M0", shape, shape[0] * shape[1]
        return entry.dtype, list(entry.shape), entry.size_bytes

    def _copy(self, name: str, entry: Entry, out: BinaryIO) -> None:
        for data in self._data(name, entry):
            out.write(data.data)
        self._progress.add(entry.size_bytes)

    def _data(self, name: str, entry: Entry) -> Iterator[Bytes]:
        if name in self._fp4:
            yield self._repacked(name)[0]
        elif name in self._weight_of:
            yield self._repacked(self._weight_of[name])[1]
        else:
            for _, raw in self._shards.blocks(entry, 0, entry.rows):
                yield raw

    def _repacked(self, name: str) -> tuple[Bytes, Bytes]:
        if self._last is not None and self._last[0] == name:
            return self._last[1]
        entries = self._shards.entries
        codes, scales = entries[name], entries[scale_name(name)]
        try:
            packed, tiles = repack(
                self._shards.rows(codes, 0, codes.rows), self._shards.rows(scales, 0, scales.rows)
            )
        except BadValueError as error:
            raise ModelLoadError(f"{name} {error}; keep this checkpoint in FP4") from None
        self._last = (name, (np.ascontiguousarray(packed), np.ascontiguousarray(tiles)))
        return self._last[1]


def _copy_rest(source: Path, target: Path) -> None:
    """Everything that is not a tensor file; index and config say what the copy is."""
    for path in sorted(source.iterdir()):
        if path.is_dir():
            shutil.copytree(path, target / path.name)
        elif path.suffix != ".safetensors" and path.name not in (INDEX_FILE, "config.json"):
            shutil.copyfile(path, target / path.name)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config["expert_dtype"] = "fp8"
    (target / "config.json").write_text(json.dumps(config, indent=2))
    if (source / INDEX_FILE).exists():
        index = json.loads((source / INDEX_FILE).read_text(encoding="utf-8"))
        sizes = [path.stat().st_size for path in target.glob("*.safetensors")]
        index["metadata"] = {**index.get("metadata", {}), "total_size": sum(sizes)}
        (target / INDEX_FILE).write_text(json.dumps(index, indent=2))


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0, or 1 with one sentence on stderr."""
    parser = argparse.ArgumentParser(
        prog="python -m model.convert", description="Repack a checkpoint's FP4 experts as FP8."
    )
    parser.add_argument("source", type=Path, metavar="IN", help="a model folder")
    parser.add_argument("target", type=Path, metavar="OUT", help="folder to write")
    parser.add_argument("--expert-dtype", choices=("fp8",), required=True)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    try:
        count = convert(given.source, given.target)
    except PenstockError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return 1
    print(f"{given.target}: {count} expert weights repacked, nothing else changed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
