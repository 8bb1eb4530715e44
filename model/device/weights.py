"""A model's weights in the forms that device ops take (deepseek-v4.md 1.3, 5.1, 5.2).

FP4 and FP8 weights arrive decoded (model.weights) and are encoded again, which loses nothing: a
scale chosen from the numbers is at most the stored one, and a power of two apart.

Shape suffixes: N outputs, K inputs, E experts, I expert width, G groups, X bytes or scales of a
row.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import torch
from torch import Tensor

from kernels.device import ReferenceDeviceOps
from kernels.reference.moe_grouped import GROUP
from penstock.errors import ModelLoadError


class ExpertFormat(StrEnum):
    """What the grouped products of the routed experts read."""

    PLAIN = "plain"
    """The activation type."""
    MXFP4 = "mxfp4"
    E4M3 = "e4m3"
    """With activations in e4m3 as well."""


@dataclass(frozen=True)
class Product:
    """x W^T. `parts` [G, N, K] add up to the weight: one, or three bfloat16 ones for a weight that
    is computed in fp32 and is not representable in bfloat16. `rounds`: the input is rounded to e4m3
    per 128 channels first (model.rounding).
    """

    parts: tuple[Tensor, ...]
    tile: int
    rounds: bool = False
    library: bool = False
    """Products of the activation type are cuBLAS's, which may split its sums by the batch."""

    def __call__(self, ops: ReferenceDeviceOps, x_RK: Tensor, dtype: torch.dtype) -> Tensor:
        """[R, G N]; x is [R, G K]."""
        groups, _, inputs = self.parts[0].shape
        if self.rounds:
            x_RK = ops.round_rows(x_RK).to(x_RK.dtype)
        x = x_RK.view(-1, groups, inputs)
        if self.library and dtype == x.dtype == self.parts[0].dtype:
            y = torch.bmm(x.transpose(0, 1), self.parts[0].transpose(1, 2))
            return y.transpose(0, 1).flatten(1)
        if len(self.parts) == 1:
            return ops.linear(x, self.parts[0], dtype=dtype, tile=self.tile).flatten(1)
        total: Tensor | None = None
        for part in self.parts:
            y = ops.linear(x, part, dtype=torch.float32, tile=self.tile)
            total = y if total is None else total + y
        assert total is not None
        return total.to(dtype).flatten(1)


@dataclass(frozen=True)
class Experts:
    """Routed experts [E, ...] in one format; scales are None for plain weights."""

    kind: ExpertFormat
    w13_ENX: Tensor
    w13_scale_ENX: Tensor | None
    w2_EDX: Tensor
    w2_scale_EDX: Tensor | None


class Tensors(Protocol):
    """Where weights come from, each once: a dict, or what makes them up on the way."""

    def pop(self, name: str, /) -> Tensor: ...


class Loader:
    """Takes tensors from their source and puts them on the device in their form."""

    def __init__(
        self,
        tensors: Tensors,
        ops: ReferenceDeviceOps,
        *,
        device: torch.device,
        dtype: torch.dtype,
        rounded: frozenset[str],
        experts: ExpertFormat,
        tile: int,
        library: bool,
    ) -> None:
        self._library = library
        self._tensors, self._ops = tensors, ops
        self._device, self._dtype, self._rounded = device, dtype, rounded
        self._experts, self._tile = experts, tile

    def raw(self, name: str) -> Tensor:
        return self._tensors.pop(name).to(self._device)

    def vector(self, name: str) -> Tensor:
        return self.raw(name).float().contiguous()

    def product(self, *names: str, groups: int = 1, wide: bool = False) -> Product:
        """Weights stacked along their outputs; `wide`: computed in fp32 (1.3)."""
        each = [self.raw(name) for name in names]
        weight = each[0] if len(each) == 1 else torch.cat(each)
        weight = weight.view(groups, weight.shape[0] // groups, weight.shape[1])
        parts = _thirds(weight, self._dtype) if wide else (weight.to(self._dtype).contiguous(),)
        return Product(parts, self._tile, names[0] in self._rounded, self._library)

    def experts(self, prefix: str, count: int) -> Experts:
        """`prefix` ends before the expert's number."""
        w13: list[tuple[Tensor, Tensor | None]] = []
        w2: list[tuple[Tensor, Tensor | None]] = []
        for expert in range(count):
            gate, up, down = (self.raw(f"{prefix}{expert}.w{n}.weight") for n in (1, 3, 2))
            w13.append(self._encoded(torch.cat((gate, up))))
            w2.append(self._encoded(down))
        return Experts(self._experts, *_stacked(w13), *_stacked(w2))

    def _encoded(self, weight_NK: Tensor) -> tuple[Tensor, Tensor | None]:
        match self._experts:
            case ExpertFormat.PLAIN:
                return weight_NK.to(self._dtype).contiguous(), None
            case ExpertFormat.MXFP4:
                codes, scales = self._ops.mxfp4_encode(weight_NK)
                values = self._ops.mxfp4_decode(codes, scales, dtype=torch.float32)
            case ExpertFormat.E4M3:
                codes, scales = encode_tiles(weight_NK)
                values = decode_tiles(codes, scales)
        if not torch.equal(values, weight_NK.float()):
            raise ModelLoadError(
                f"experts cannot be kept as {self._experts.value} without loss; "
                "this is a fault of Penstock, please report it with the model's name"
            )
        return codes, scales


def _stacked(parts: list[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor | None]:
    scales = [scale for _, scale in parts if scale is not None]
    return torch.stack([codes for codes, _ in parts]), torch.stack(scales) if scales else None


def _thirds(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The weight in parts of the activation type, smallest first; one if it holds all of it."""
    wide = weight.float()
    if dtype == torch.float32 or torch.equal(wide.to(dtype).float(), wide):
        return (wide.to(dtype).contiguous(),)
    parts: list[Tensor] = []
    for _ in range(3):
        part = wide.to(dtype)
        parts.append(part.contiguous())
        wide = wide - part.float()
    return tuple(reversed(parts))


def _tiles(weight_NK: Tensor) -> Tensor:
    """[N / 128, 128, K / 128, 128], zeros beyond the edge."""
    rows, columns = weight_NK.shape
    padded = torch.nn.functional.pad(weight_NK, (0, -columns % GROUP, 0, -rows % GROUP))
    return padded.view(padded.shape[0] // GROUP, GROUP, -1, GROUP)


def encode_tiles(weight_NK: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 codes [N, K] and ue8m0 scales uint8 [N / 128, K / 128] of a decoded FP8 weight."""
    tiles = _tiles(weight_NK.float())
    bits = tiles.abs().amax((1, 3)).clamp_min(1e-30).view(torch.int32)
    exponent = (bits >> 23) - 135 + ((bits & 0x7FFFFF) > 0x600000).to(torch.int32)
    exponent = exponent.clamp_min(-126)
    inverse = ((127 - exponent) << 23).view(torch.float32)
    codes = (tiles * inverse[:, None, :, None]).clamp(-448.0, 448.0)
    codes = codes.view(tiles.shape[0] * GROUP, -1)[: weight_NK.shape[0], : weight_NK.shape[1]]
    return codes.to(torch.float8_e4m3fn).contiguous(), (exponent + 127).to(torch.uint8)


def decode_tiles(codes_NK: Tensor, scales: Tensor) -> Tensor:
    """fp32 [N, K]."""
    factor = (scales.to(torch.int32) << 23).view(torch.float32)
    factor = factor.repeat_interleave(GROUP, 0).repeat_interleave(GROUP, 1)
    return codes_NK.float() * factor[: codes_NK.shape[0], : codes_NK.shape[1]]
