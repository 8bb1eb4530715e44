"""Which implementation of the device ops a process uses: chosen once, from the device and
`PENSTOCK_KERNELS__BACKEND`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch

from kernels.device import ReferenceDeviceOps
from kernels.ops import BACKEND_VARIABLE, BackendError, asked_backend

INTERPRETER_VARIABLE = "TRITON_INTERPRET"
# Triton has e4m3, the format of the cache and of activations, from this compute capability on.
_LEAST_CAPABILITY = (8, 9)


def load_device(
    device: torch.device | str,
    backend: str | None = None,
    *,
    environ: Mapping[str, str] = os.environ,
) -> ReferenceDeviceOps:
    """The device ops of `backend` (default: `PENSTOCK_KERNELS__BACKEND`, else `auto`) on `device`.

    `auto` is Triton on CUDA devices that have e4m3 and the reference elsewhere. Triton on a CPU
    needs its interpreter, and `native` is a set for the engine on a CPU only. Raises BackendError.
    """
    kind, capability = torch.device(device).type, _capability(torch.device(device))
    asked = asked_backend(backend, environ)
    if asked == "native":
        raise BackendError(
            f"kernel backend 'native' has no ops for a device engine; set {BACKEND_VARIABLE} to "
            "'auto', 'triton' or 'reference'"
        )
    able = kind == "cuda" and capability >= _LEAST_CAPABILITY
    if asked == "reference" or (asked == "auto" and not able):
        return ReferenceDeviceOps()
    if kind == "cuda" and not able:
        raise BackendError(
            "kernel backend 'triton' needs compute capability 8.9 for e4m3, this device has "
            f"{capability[0]}.{capability[1]}; set {BACKEND_VARIABLE} to 'auto' or 'reference'"
        )
    if kind != "cuda" and environ.get(INTERPRETER_VARIABLE) != "1":
        raise BackendError(
            f"kernel backend 'triton' needs a CUDA device, not {kind!r}; set {BACKEND_VARIABLE} to "
            f"'auto', or {INTERPRETER_VARIABLE}=1 before the start to interpret the kernels"
        )
    try:
        from kernels.triton.ops import TritonDeviceOps
    except ImportError as error:
        raise BackendError(
            f"kernel backend 'triton' cannot be imported ({error}); install triton>=3.6 or set "
            f"{BACKEND_VARIABLE}=reference"
        ) from error
    return TritonDeviceOps()


def _capability(device: torch.device) -> tuple[int, int]:
    """Of a CUDA device; where none can be asked, the launch will say what is missing."""
    if device.type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_capability(device)
    return _LEAST_CAPABILITY
