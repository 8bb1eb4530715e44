"""Cache rows: the values that attention uses, and their stored bytes (architecture.md, "The
store").

A row is rounded once, when it is born. Memory holds the rounded values as fp32; bytes are made from
them on export, so a restored row and a computed one are the same number.

Shape suffixes: R rows, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.ops import ReferenceOps
from model.config import ModelConfig
from model.engine import Buffer
from model.layout import KvFormat


class RowCodec:
    """Rounding, encoding and decoding of attention rows and index keys in one KV format."""

    def __init__(
        self,
        config: ModelConfig,
        kv: KvFormat,
        ops: ReferenceOps,
        *,
        index: KvFormat | None = None,
    ) -> None:
        """`index`: format of index keys, if it is not that of the other rows."""
        self._nope, self._dim, self._index_dim = config.nope_dim, config.head_dim, config.index_dim
        self._kv, self._index, self._ops = kv, index or kv, ops
        self._signs = ops.hadamard_matrix(config.index_dim)

    def round_kv(self, x_RC: Tensor) -> Tensor:
        match self._kv:
            case KvFormat.FP8:
                return self._ops.fp8_round(x_RC, self._nope)
            case KvFormat.BF16:
                return self._ops.bf16_round(x_RC)
            case KvFormat.FP32:
                return x_RC

    def round_index(self, x_RC: Tensor) -> Tensor:
        """Index queries and keys. Without FP4 the Hadamard rotation cancels and is left out
        (2.4).
        """
        match self._index:
            case KvFormat.FP8:
                return self._ops.index_round(x_RC, self._signs)
            case KvFormat.BF16:
                return self._ops.bf16_round(x_RC)
            case KvFormat.FP32:
                return x_RC

    def encode(self, x_RC: Tensor, *, index: bool) -> bytes:
        match self._index if index else self._kv:
            case KvFormat.FP8 if index:
                return _bytes(self._ops.fp4_encode(x_RC))
            case KvFormat.FP8:
                return _bytes(self._ops.fp8_encode(x_RC, self._nope))
            case KvFormat.BF16:
                return _bytes(x_RC.to(torch.bfloat16))
            case KvFormat.FP32:
                return _bytes(x_RC)

    def decode(self, payload: Buffer, rows: int, *, index: bool) -> Tensor:
        raw = torch.frombuffer(bytearray(payload), dtype=torch.uint8).view(rows, -1)
        match self._index if index else self._kv:
            case KvFormat.FP8 if index:
                return self._ops.fp4_decode(raw, self._index_dim)
            case KvFormat.FP8:
                return self._ops.fp8_decode(raw, self._dim, self._nope)
            case KvFormat.BF16:
                return raw.view(torch.bfloat16).float()
            case KvFormat.FP32:
                return raw.view(torch.float32)


def fp32_bytes(x: Tensor) -> bytes:
    return _bytes(x.float())


def fp32_rows(payload: Buffer, rows: int) -> Tensor:
    return torch.frombuffer(bytearray(payload), dtype=torch.float32).view(rows, -1)


def _bytes(x: Tensor) -> bytes:
    return x.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
