"""Models are built once a session; engines once a test that needs them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.model import oracle


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], oracle.OracleModel]:
    """`model(name)`: the folder of that model and its oracle."""
    root: Path = tmp_path_factory.mktemp("models")
    built: dict[str, oracle.OracleModel] = {}

    def get(name: str) -> oracle.OracleModel:
        if name not in built:
            built[name] = oracle.build(name, root / name)
        return built[name]

    return get
