"""Whether a model can be cut over the ranks given, before anything is started. Torch-free."""

from __future__ import annotations

from model.config import ModelConfig
from model.grid import Grid
from model.tensors import check_grid
from penstock.folder import model_folder
from penstock.worker import ModelSpec, RankSpec


def check_ranks(spec: ModelSpec, ranks: RankSpec) -> None:
    """Raises `ModelLoadError` with the numbers, or if there is no such model folder.

    Reads the folder's `config.json` only. The fake fits any ranks.
    """
    folder = model_folder(spec.model)
    if folder is not None and ranks.world > 1:
        check_grid(ModelConfig.load(folder), Grid(ranks.tensor, ranks.expert, ranks.context))
