"""The shipped model folder: what it contains and that it answers."""

from __future__ import annotations

import json
import pathlib

import pytest

torch = pytest.importorskip("torch")

from training import documents, evaluate, export, vocabulary  # noqa: E402
from training.config import TrainingConfig  # noqa: E402
from training.rounding import PLAIN, SERVED, Cache  # noqa: E402

FOLDER = pathlib.Path(__file__).parents[2] / "penstock" / "shipped" / "ledger"


def test_the_tokenizer_is_the_one_that_the_code_builds() -> None:
    assert (FOLDER / "tokenizer.json").read_text("ascii") == vocabulary.as_json()


def test_config_and_generation_config_name_the_full_stop_as_the_end() -> None:
    tok = vocabulary.tokenizer()
    config = json.loads((FOLDER / "config.json").read_text("ascii"))
    generation = json.loads((FOLDER / "generation_config.json").read_text("ascii"))
    assert config["eos_token_id"] == generation["eos_token_id"] == tok.token_to_id(".")
    assert config["compress_ratios"] == [0, 0, 128, 4]
    assert config["penstock"] == {"chat": "ledger"}


def test_the_record_names_config_command_and_seed() -> None:
    cfg = TrainingConfig.read(FOLDER / "training.yaml")
    record = json.loads((FOLDER / "training.json").read_text("ascii"))
    assert record["seed"] == cfg.seed
    assert record["command"]
    assert record["evaluation"]
    assert (FOLDER / "model.safetensors").stat().st_size <= 8_000_000


@pytest.mark.parametrize("cache", [PLAIN, SERVED])
def test_it_answers_about_fresh_documents(cache: Cache) -> None:
    """Three documents of about 4k tokens, 36 questions with held-out names, at most one error."""
    torch.set_num_threads(1)
    network, tok, tally = export.load(FOLDER), vocabulary.tokenizer(), evaluate.Tally()
    for seed in (1, 2, 3):
        document = documents.make_document(
            seed,
            tokens_at_least=4000,
            facts=24,
            count=lambda text: len(tok.encode(text).ids),
            accept=documents.held_out,
        )
        questions = documents.make_questions(document, seed, 8, 4, accept=documents.held_out)
        evaluate.ask(network, tok, document, questions, tally, cache=cache)
    wrong = tally.answerable - tally.exact + tally.hallucinated
    print(f"36 questions, {wrong} wrong: {tally.errors}")
    assert wrong <= 1
