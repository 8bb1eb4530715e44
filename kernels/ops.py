"""One dispatch for all ops: `load(backend)` returns the set that the model calls.

A faster backend subclasses `ReferenceOps` and overrides what it has; the reference is the meaning.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping

import torch

from kernels.reference.ops import ReferenceOps
from kernels.reference.unpadded import UnpaddedOps

__all__ = ["BACKEND_VARIABLE", "BackendError", "ReferenceOps", "asked_backend", "load", "suited"]

BACKEND_VARIABLE = "PENSTOCK_KERNELS__BACKEND"
_BACKENDS = ("auto", "triton", "native", "reference")
_log = logging.getLogger(__name__)


class BackendError(ValueError):
    """The asked-for kernel backend cannot be used here. One sentence."""


def asked_backend(backend: str | None, environ: Mapping[str, str]) -> str:
    """The name that was asked for, checked. Raises BackendError."""
    asked = backend or environ.get(BACKEND_VARIABLE, "auto")
    if asked not in _BACKENDS:
        raise BackendError(
            f"{BACKEND_VARIABLE} is {asked!r}; it must be one of {', '.join(_BACKENDS)}"
        )
    return asked


def load(backend: str | None = None, *, environ: Mapping[str, str] = os.environ) -> ReferenceOps:
    """The CPU engine's ops of `backend` (default: `PENSTOCK_KERNELS__BACKEND`, else `auto`).

    `auto` is `native` where it can be compiled and the reference elsewhere (with a warning: the
    two sets share no blocks). Triton's ops are coarser (`kernels.dispatch.load_device`). Raises
    BackendError.
    """
    asked = asked_backend(backend, environ)
    if asked == "triton":
        raise BackendError(
            "kernel backend 'triton' has no ops for the engine on a CPU; set "
            f"{BACKEND_VARIABLE} to 'auto', 'native' or 'reference'"
        )
    if asked == "reference":
        return ReferenceOps()
    from kernels.native.build import BuildError
    from kernels.native.ops import NativeOps

    try:
        return NativeOps()
    except BuildError as error:
        if asked == "native":
            raise BackendError(f"kernel backend 'native' is not possible here: {error}") from None
        _log.warning("the slow reference kernels are used: %s", error)
        return ReferenceOps()


def suited(
    ops: ReferenceOps,
    dtype: torch.dtype,
    *,
    streams: int,
    channels: Iterable[int],
    exact: bool = True,
) -> ReferenceOps:
    """`ops`, or the reference where a model's activation type or shapes are not theirs.

    `exact` False: the reference need not keep rows apart.
    """
    if not ops.suits(dtype, streams, tuple(channels)):
        ops = ReferenceOps()
    return UnpaddedOps() if type(ops) is ReferenceOps and not exact else ops
