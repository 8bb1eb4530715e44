"""The engine contract on the torch engine and on the fake."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from model.fake import FakeEngine, FakeSettings
from model.load import load_engine
from model.torch_engine import TorchEngine
from tests.model import drafted, engine_contract, oracle


@pytest.mark.parametrize("clause", engine_contract.CLAUSES, ids=lambda clause: clause.__name__)
def test_torch_engine_keeps_the_contract(
    clause: Callable[[engine_contract.Factory], None],
    model: Callable[[str], oracle.OracleModel],
) -> None:
    folder = model("all_kinds").folder

    def make() -> TorchEngine:
        return load_engine(folder)

    clause(make)


@pytest.mark.parametrize("kind", drafted.KINDS)
@pytest.mark.parametrize("clause", engine_contract.DRAFT_CLAUSES, ids=lambda c: c.__name__)
def test_a_drafting_torch_engine_keeps_the_contract(
    clause: Callable[[engine_contract.Factory], None],
    kind: str,
    model: Callable[[str], oracle.OracleModel],
) -> None:
    source = model("all_kinds")
    folder = drafted.folder_of(source.folder.parent, source, kind)
    clause(lambda: load_engine(folder, draft_tokens=4))


@pytest.mark.parametrize("clause", engine_contract.CLAUSES, ids=lambda clause: clause.__name__)
def test_the_fake_keeps_the_contract(clause: Callable[[engine_contract.Factory], None]) -> None:
    clause(FakeEngine)


@pytest.mark.parametrize("clause", engine_contract.CLAUSES, ids=lambda clause: clause.__name__)
def test_a_drafting_fake_keeps_the_contract(
    clause: Callable[[engine_contract.Factory], None],
) -> None:
    clause(lambda: FakeEngine(FakeSettings(draft_tokens=5, draft_accuracy=0.6)))
