"""The shipped `ledger` against the network that trained it; its evidence against the document."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

import penstock
from model.engine import Segment
from model.load import load_engine

FOLDER = Path(penstock.__file__).parent / "shipped" / "ledger"
pytestmark = pytest.mark.skipif(
    not (FOLDER / "model.safetensors").exists(), reason="no shipped ledger in this checkout"
)


@pytest.mark.parametrize(("kv", "tolerance"), [("fp32", 1e-3), ("fp8", 0.05)])
def test_ledger_serves_what_was_trained_and_cites_its_source(kv: str, tolerance: float) -> None:
    from training import documents, export
    from training.batches import question_block
    from training.network import Batch
    from training.rounding import PLAIN, SERVED

    tok = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    document = documents.make_document(
        3, tokens_at_least=3000, facts=12, count=lambda text: len(tok.encode(text).ids)
    )
    question = documents.make_questions(document, 3, 1, 0)[0]
    block, at = question_block(random.Random(0), [(question.name, question.answer)], full=1.0)
    encoded = tok.encode(document.text + block)
    first = encoded.char_to_token(len(document.text) + at[0])
    gold = encoded.char_to_token(document.digits_at[question.name])
    assert first is not None
    assert gold is not None
    tokens = encoded.ids[:first]
    engine = load_engine(FOLDER, kv_cache_dtype=kv)
    sequence = engine.open(first)
    engine.forward([Segment(sequence, tokens)])
    got = torch.frombuffer(bytearray(engine.logits([sequence]).row(0)), dtype=torch.float32)
    batch = Batch(
        torch.tensor([tokens]),
        torch.arange(first)[None],
        torch.tensor([first]),
        torch.tensor([first - 1]),
    )
    with torch.inference_mode():
        wanted = export.load(FOLDER)(batch, cache=SERVED if kv == "fp8" else PLAIN)[0][0]
    worst = (got - wanted).abs().max().item()
    heaviest = engine.evidence(sequence)[0]
    print(f"{first} tokens, {kv}: worst difference {worst:.2e}; gold {gold}, evidence {heaviest}")
    assert worst <= tolerance
    assert got.argmax() == wanted.argmax()
    assert heaviest.start <= gold < heaviest.end
