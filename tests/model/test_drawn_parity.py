"""Random tiny models against transformers 5.23.0, on every path (deepseek-v4.md 12; issue 3).

All rounding is off and every position is compared. Where the oracle's own choice (indexer or
router) hangs on less than `SLACK`, two right implementations may choose differently, and what they
choose is seen by every later position: a difference is excused there, counted and printed, and
nowhere else.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, note
from hypothesis import strategies as st
from safetensors.torch import load_file

from cluster.cli.main import main
from model.engine import Segment
from model.layers.indexer import Indexer
from model.layout import EVIDENCE_PAIRS
from model.load import load_engine
from model.torch_engine import TorchEngine
from penstock.blocks import BLOCK_TOKENS
from tests.model import drawn, oracle

TOLERANCE = 1e-4
SLACK = 2e-5
MOST = 700
DECODED = 24
lengths = st.one_of(st.integers(1, 40), st.integers(1, MOST))


@contextmanager
def built(config: dict[str, Any], seed: int) -> Iterator[oracle.OracleModel]:
    folder = Path(tempfile.mkdtemp())
    try:
        yield oracle.build_changed(config, folder, seed=seed)
    finally:
        shutil.rmtree(folder)


def rows_of(engine: TorchEngine, sequence: Any, tokens: list[int]) -> torch.Tensor:
    """[n, V]: absorb `tokens` and return the logits after each."""
    found = engine.forward([Segment(sequence, tokens, all_logits=True)])[0].logits
    assert found is not None
    return torch.stack([as_tensor(found.row(i)) for i in range(len(found))])


def as_tensor(row: memoryview) -> torch.Tensor:
    return torch.frombuffer(bytearray(row), dtype=torch.float32)


def ragged(engine: TorchEngine, tokens: list[int], ends: list[int]) -> torch.Tensor:
    sequence, parts, start = engine.open(len(tokens)), [], 0
    for end in ends:
        parts.append(rows_of(engine, sequence, tokens[start:end]))
        start = end
    engine.release(sequence)
    return torch.cat(parts)


def resumed(engine: TorchEngine, tokens: list[int], cut: int) -> torch.Tensor:
    """Rows from `cut` on: prefill, carried over as blocks and state, then token by token."""
    source, target = engine.open(len(tokens)), engine.open(len(tokens))
    engine.forward([Segment(source, tokens[:cut])])
    for index in range(cut // BLOCK_TOKENS):
        engine.load_block(target, index, engine.export_block(source, index))
    engine.load_state(target, cut, engine.export_state(source))
    parts = [as_tensor(engine.logits([target]).row(0))[None]]
    parts += [rows_of(engine, target, [token]) for token in tokens[cut:]]
    engine.release(source)
    engine.release(target)
    return torch.cat(parts)


class Differences:
    """Compares rows with the oracle's and keeps the book of what was excused."""

    def __init__(self) -> None:
        self.rows: Counter[str] = Counter()
        self.worst = 0.0

    def compare(self, path: str, got: torch.Tensor, seen: oracle.Watched, start: int = 0) -> None:
        wanted = seen.logits_LV[start : start + len(got)]
        off = (got - wanted).abs().amax(1)
        close = (seen.margin_L < SLACK).nonzero()
        first_tie = int(close[0]) - start if len(close) else len(got)
        bad = (off > TOLERANCE).nonzero()
        excused = len(got) - max(first_tie, 0) if len(bad) else 0
        assert not len(bad) or int(bad[0]) >= first_tie, (
            f"{path}: position {int(bad[0]) + start} is off by {off.max():.1e}; "
            f"first near tie at {first_tie + start}"
        )
        self.rows["compared"] += len(got) - excused
        self.rows["excused"] += excused
        strict = off[: max(first_tie, 0)] if excused else off
        self.worst = max(self.worst, strict.max().item() if len(strict) else 0.0)

    def report(self, name: str) -> None:
        print(f"\n{name}: worst difference {self.worst:.1e} of {dict(self.rows)} rows")


@pytest.mark.parametrize("index_heads", [(32,), (4, 8)], ids=["selecting", "every block selected"])
def test_random_models_agree_with_transformers_on_every_path(index_heads: tuple[int, ...]) -> None:
    book = Differences()

    @drawn.examples(8 if len(index_heads) == 1 else 3)
    @given(config=drawn.configs(index_heads=index_heads), seed=st.integers(0, 999), data=st.data())
    def every_path(config: dict[str, Any], seed: int, data: st.DataObject) -> None:
        length = data.draw(lengths, label="length")
        ends = data.draw(drawn.cuts(length), label="ends")
        cut = max(length - data.draw(st.integers(0, DECODED), label="decoded"), 1)
        with built(config, seed) as source:
            tokens = source.tokens(length, seed)
            seen = source.watched(tokens)
            note(f"logits std {seen.logits_LV.std():.2f}")
            engine = load_engine(source.folder, kv_cache_dtype="fp32", dtype="float32")
            book.compare("one chunk", ragged(engine, tokens, [length]), seen)
            book.compare("ragged chunks", ragged(engine, tokens, ends), seen)
            book.compare("resumed", resumed(engine, tokens, cut), seen, cut - 1)
            engine.close()

    every_path()
    book.report(f"index heads {index_heads}")
    # The excuse must stay the exception, or the test has lost its strength.
    assert book.rows["compared"] > 9 * book.rows["excused"]


@drawn.examples(2)
@given(config=drawn.configs(), seed=st.integers(0, 999), data=st.data())
def test_penstock_logits_agrees_with_transformers(
    config: dict[str, Any], seed: int, data: st.DataObject
) -> None:
    """The user's door: chunks, the store's wire format, then decode beside another sequence."""
    length = data.draw(st.integers(2, 300), label="length")
    with built(config, seed) as source:
        tokens = source.tokens(length, seed)
        given_, beside, out = (source.folder / name for name in ("t.json", "b.json", "out"))
        given_.write_text(json.dumps(tokens))
        beside.write_text(json.dumps(tokens[::-1]))
        prefill = max(length - data.draw(st.integers(1, 16), label="decoded"), 1)
        flags = {
            "--tokens": given_,
            "--out": out,
            "--batch-with": beside,
            "--chunk-tokens": data.draw(st.integers(16, 300), label="chunk"),
            "--prefill-tokens": prefill,
            "--kv-cache-dtype": "fp32",
            "--dtype": "float32",
        }
        line = [str(part) for pair in flags.items() for part in pair]
        assert main(["logits", str(source.folder), *line]) == 0
        Differences().compare("logits", load_file(out)["logits"], source.watched(tokens))


@drawn.examples(5)
@given(
    config=drawn.configs().filter(lambda c: 4 in c["ratios"]),
    topk=st.integers(1, EVIDENCE_PAIRS),
    start=st.integers(0, 300),
    seed=st.integers(0, 999),
)
def test_evidence_is_the_oracles_selection_and_its_mass(
    config: dict[str, Any], topk: int, start: int, seed: int
) -> None:
    """With at most 8 selected entries the evidence names all of them: the same set as the oracle's
    top-k, and the same attention mass, at every position up to the first near tie.
    """
    with built({**config, "index_topk": topk}, seed) as source:
        tokens = source.tokens(start + 12, seed)
        seen = source.watched(tokens)
        layer = max(seen.scores)
        ties = (seen.margin_L < SLACK).nonzero()
        until = int(ties[0]) if len(ties) else len(tokens)
        engine = load_engine(source.folder, kv_cache_dtype="fp32", dtype="float32")
        sequence = engine.open(len(tokens))
        if start:
            engine.forward([Segment(sequence, tokens[:start])])
        for position in range(start, min(until, len(tokens))):
            engine.forward([Segment(sequence, [tokens[position]])])
            got = {e.end // 4 - 1: e for e in engine.evidence(sequence)}
            score = seen.scores[layer][position]
            chosen = score.topk(min(topk, len(score))).indices.tolist()
            wanted = {e for e in chosen if score[e] > float("-inf")}
            assert set(got) == wanted, position
            for entry, found in got.items():
                assert found.start == max(entry - 1, 0) * 4
                mass = seen.mass[layer][position, entry].item()
                assert abs(found.mass - mass) <= TOLERANCE, (position, entry)
        engine.close()


@drawn.examples(4)
@given(
    config=drawn.configs().filter(lambda c: 4 in c["ratios"]),
    topk=st.integers(9, 64),
    seed=st.integers(0, 999),
)
def test_the_selection_is_the_oracles_as_a_set(
    config: dict[str, Any], topk: int, seed: int
) -> None:
    """Every layer and position: entries that only one side selects score within the slack of the
    oracle's last selected one. What an earlier near tie changed is not held against later layers.
    """
    with built({**config, "index_topk": topk}, seed) as source, selections() as picked:
        tokens = source.tokens(500, seed)
        seen = source.watched(tokens)
        ties = (seen.margin_L < SLACK).nonzero()
        until = int(ties[0]) + 1 if len(ties) else len(tokens)
        engine = load_engine(source.folder, kv_cache_dtype="fp32", dtype="float32")
        sequence = engine.open(len(tokens))
        # In the last layer only rows whose logits are wanted are selected for.
        engine.forward([Segment(sequence, tokens, all_logits=True)])
        engine.close()
        assert len(picked) == len(seen.scores)
        for layer, ours in zip(sorted(seen.scores), picked, strict=True):
            for position in range(until):
                score = seen.scores[layer][position]
                visible = int((score > float("-inf")).sum())
                got = {e for e in ours[position].tolist() if e >= 0}
                assert len(got) == min(topk, visible)
                chosen = score.topk(len(got))
                last = chosen.values.amin().item() if got else 0.0
                for entry in got ^ set(chosen.indices.tolist()):
                    assert abs(score[entry].item() - last) <= SLACK, (layer, position, entry)


@contextmanager
def selections() -> Iterator[list[torch.Tensor]]:
    """What each CSA layer selects, [rows, k], in the order of the layers."""
    found: list[torch.Tensor] = []
    select = Indexer.select

    def spy(self: Indexer, *args: Any) -> torch.Tensor:
        found.append(select(self, *args))
        return found[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Indexer, "select", spy)
        yield found
