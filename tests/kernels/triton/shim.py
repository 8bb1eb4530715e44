"""Repairs of Triton's CPU interpreter, so that it computes what a GPU computes. Tests only.

Three faults of versions 3.6 to 3.9 matter here: down-casts to bfloat16 and e4m3 truncate where a
GPU rounds to nearest even (and saturates e4m3 at 448), `tl.dot` of bfloat16 multiplies the raw
bits, and so does bfloat16 arithmetic. The first two are repaired through torch; the third raises,
because our kernels widen to fp32 right after a load.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_TORCH = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
    "fp8e4nv": torch.float8_e4m3fn,
}
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _torch_of(data: Any, dtype: Any) -> torch.Tensor:
    kind = _TORCH[str(dtype.scalar)]
    signed = np.ascontiguousarray(data).view(f"i{kind.itemsize}" if kind.itemsize > 1 else "u1")
    return torch.from_numpy(signed.copy()).view(kind)


def _numpy_of(x: torch.Tensor) -> Any:
    size = x.dtype.itemsize
    return x.contiguous().view(_BITS[size]).numpy().view(f"u{size}")


def _convert(data: Any, source: Any, target: Any, rounding: Any) -> Any:
    del rounding  # only round-to-nearest-even is used
    values = _torch_of(data, source)
    kind = _TORCH[str(target.scalar)]
    if kind is torch.float8_e4m3fn:
        values = values.to(torch.float32).clamp(-448.0, 448.0)
    return _numpy_of(values.to(kind)).reshape(np.shape(data))


def _dot(self: Any, a: Any, b: Any, d: Any, precision: Any, imprecise: Any) -> Any:
    del self, precision, imprecise
    left, right = _torch_of(a.data, a.dtype), _torch_of(b.data, b.dtype)
    if left.dtype != torch.float64:
        left, right = left.float(), right.float()
    product = torch.matmul(left, right).numpy().astype(d.data.dtype)
    return interpreter.TensorHandle(product + d.data, d.dtype.scalar)


def install() -> None:
    """Once a process; a second call changes nothing."""
    builder = interpreter.InterpreterBuilder
    if builder.create_dot is _dot:
        return
    interpreter._convert_float = _convert
    builder.create_dot = _dot
    binary = builder.binary_op
    bitwise = (np.bitwise_and, np.bitwise_or, np.bitwise_xor)

    def checked(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
        if lhs.dtype.scalar == tl.bfloat16 and op not in bitwise:
            raise AssertionError("a kernel computes in bfloat16: widen to fp32 after the load")
        return binary(self, lhs, rhs, op)

    builder.binary_op = checked
