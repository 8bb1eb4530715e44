"""The engine contract on the torch engine and on the fake."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from model.fake import FakeEngine, FakeSettings
from model.load import load_engine
from model.torch_engine import TorchEngine
from tests.model import engine_contract, oracle


@pytest.mark.parametrize("clause", engine_contract.CLAUSES, ids=lambda clause: clause.__name__)
def test_torch_engine_keeps_the_contract(
    clause: Callable[[engine_contract.Factory], None],
    model: Callable[[str], oracle.OracleModel],
) -> None:
    folder = model("all_kinds").folder

    def make() -> TorchEngine:
        return load_engine(folder)

    clause(make)


@pytest.mark.parametrize("clause", engine_contract.CLAUSES, ids=lambda clause: clause.__name__)
def test_the_fake_keeps_the_contract(clause: Callable[[engine_contract.Factory], None]) -> None:
    clause(FakeEngine)


@pytest.mark.parametrize("clause", engine_contract.CLAUSES, ids=lambda clause: clause.__name__)
def test_a_drafting_fake_keeps_the_contract(
    clause: Callable[[engine_contract.Factory], None],
) -> None:
    clause(lambda: FakeEngine(FakeSettings(draft_tokens=5, draft_accuracy=0.6)))
