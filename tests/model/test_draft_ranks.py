"""Draft modules cut over ranks: the same drafts on every rank, and as good as one rank's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from model.engine import DraftRequest, Engine, Segment
from penstock.request import Sampling
from tests.model import drafted, oracle
from tests.model.engine_contract import snapshot
from tests.model.ranked import ranks

Models = Callable[[str], oracle.OracleModel]


@pytest.mark.parametrize("kind", drafted.KINDS)
def test_ranks_draft_alike_and_as_one_rank_does(kind: str, model: Models) -> None:
    source = model("all_kinds")
    folder = drafted.folder_of(source.folder.parent, source, kind)
    tokens = source.tokens(160)

    def work(engine: Engine) -> tuple[list[list[int]], list[bytes], np.ndarray[Any, Any]]:
        sequence = engine.open(200)
        drafts: list[list[int]] = []
        engine.forward([Segment(sequence, tokens[:140])])
        for step in range(6):
            at = sequence.position
            asked = DraftRequest(sequence, tokens[at], 4, Sampling(temperature=0.0))
            drafts += engine.draft([asked])
            engine.forward([Segment(sequence, [tokens[at], *drafts[-1]], seekable=True)])
            engine.seek(sequence, at + 1 + step % 2)
        row = np.array(engine.logits([sequence]).row(0))
        return drafts, snapshot(engine, sequence), row

    options: dict[str, Any] = {"kv_cache_dtype": "fp32", "dtype": "float32", "draft_tokens": 4}
    with ranks(folder, **options) as one:
        ((want, _, row),) = one.each(work)
    with ranks(folder, tp=2, **options) as two:
        found = two.each(work)
    assert found[0][:2] == found[1][:2], "the ranks' caches drifted apart"
    assert found[0][0] == want
    assert float(np.abs(found[0][2] - row).max()) <= 1e-5
