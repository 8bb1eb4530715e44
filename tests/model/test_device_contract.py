"""The engine contract on the device engine, with the reference ops on a CPU (sums in float64, see
kernels/double.py): every clause, the bitwise ones included.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from model.device.engine import DeviceEngine
from model.load import load_device_engine
from tests.model import engine_contract, oracle


@pytest.mark.parametrize("clause", engine_contract.CLAUSES, ids=lambda clause: clause.__name__)
def test_device_engine_keeps_the_contract(
    clause: Callable[[engine_contract.Factory], None],
    model: Callable[[str], oracle.OracleModel],
) -> None:
    folder = model("all_kinds").folder

    def make() -> DeviceEngine:
        return load_device_engine(folder, device="cpu", backend="reference")

    clause(make)
