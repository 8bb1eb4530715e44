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


def load_device(
    device: torch.device | str,
    backend: str | None = None,
    *,
    environ: Mapping[str, str] = os.environ,
) -> ReferenceDeviceOps:
    """The device ops of `backend` (default: `PENSTOCK_KERNELS__BACKEND`, else `auto`) on `device`.

    `auto` is Triton on CUDA and the reference elsewhere. Triton on a CPU needs its interpreter, and
    `native` is a set for the engine on a CPU only. Raises BackendError.
    """
    kind = torch.device(device).type
    asked = asked_backend(backend, environ)
    if asked == "native":
        raise BackendError(
            f"kernel backend 'native' has no ops for a device engine; set {BACKEND_VARIABLE} to "
            "'auto', 'triton' or 'reference'"
        )
    if asked in ("reference", "native") or (asked == "auto" and kind != "cuda"):
        return ReferenceDeviceOps()
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
