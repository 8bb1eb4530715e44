from __future__ import annotations

import pytest
import torch
import triton

from tests.kernels.triton import shim

if not triton.knobs.runtime.interpret:
    raise pytest.UsageError(
        "TRITON_INTERPRET must be 1 before triton is imported; tests/conftest.py sets it"
    )
shim.install()
torch.set_num_threads(1)
