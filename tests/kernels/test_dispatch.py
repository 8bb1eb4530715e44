"""One dispatch: chosen from the device and the variable, one clear error where it cannot be."""

from __future__ import annotations

import pytest
import torch

from kernels import ops
from kernels.dispatch import load_device


def test_auto_takes_the_reference_on_a_cpu() -> None:
    assert load_device("cpu", environ={}).name == "reference-1"


def test_the_variable_decides() -> None:
    environ = {"PENSTOCK_KERNELS__BACKEND": "triton", "TRITON_INTERPRET": "1"}
    assert load_device("cpu", environ=environ).name == "triton-1"
    assert load_device("cuda", environ={}).name == "triton-1"
    assert load_device("cuda", "reference", environ=environ).name == "reference-1"


def test_triton_on_a_cpu_needs_the_interpreter() -> None:
    with pytest.raises(ops.BackendError, match="needs a CUDA device, not 'cpu'; set PENSTOCK"):
        load_device("cpu", "triton", environ={})
    with pytest.raises(ops.BackendError, match="no ops for the engine on a CPU"):
        ops.load("triton", environ={})


def test_a_device_without_e4m3_takes_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert load_device("cuda", environ={}).name == "reference-1"
    with pytest.raises(ops.BackendError, match=r"needs compute capability 8\.9 .* has 8\.0; set"):
        load_device("cuda", "triton", environ={})


def test_the_cpu_s_native_set_is_not_a_device_s() -> None:
    for device in ("cpu", "cuda"):
        with pytest.raises(ops.BackendError, match="'native' has no ops for a device engine"):
            load_device(device, "native", environ={})


def test_an_unknown_backend_is_refused() -> None:
    for load in (ops.load, lambda name, environ: load_device("cpu", name, environ=environ)):
        with pytest.raises(ops.BackendError, match="must be one of auto, triton"):
            load("cutlass", environ={})
