"""The shipped model through the whole cluster: answers come from its weights, and turns reuse each
other.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from penstock.tokenizer import open_tokenizer
from tests.cluster.harness import Cluster, cluster
from training.documents import Document, Question, make_document, make_questions


def document(seed: int, tokens: int, facts: int) -> Document:
    tokenizer = open_tokenizer("ledger")
    assert tokenizer is not None
    return make_document(
        seed, tokens_at_least=tokens, facts=facts, count=lambda text: len(tokenizer.encode(text))
    )


def ask(c: Cluster, document: Document, question: Question) -> str:
    content = f"{document.text}\n\n{question.text}"
    return c.chat([{"role": "user", "content": content}], max_tokens=8).text


def exact_match(c: Cluster, seed: int, questions: int) -> float:
    text = document(seed, 1500, questions)
    asked = make_questions(text, seed, questions, 0)
    return sum(ask(c, text, q) == q.answer for q in asked) / len(asked)


@pytest.fixture(scope="module")
def ledger() -> Iterator[Cluster]:
    with cluster("ledger") as c:
        yield c


def test_the_answers_come_from_the_weights_of_the_head(ledger: Cluster, tmp_path: Path) -> None:
    folder = tmp_path / "permuted"
    shutil.copytree(Path(str(files("penstock").joinpath("shipped", "ledger"))), folder)
    tensors = load_file(folder / "model.safetensors")
    order = torch.randperm(len(tensors["head.weight"]), generator=torch.Generator().manual_seed(1))
    tensors["head.weight"] = tensors["head.weight"][order].contiguous()
    save_file(tensors, folder / "model.safetensors")
    right = exact_match(ledger, 11, 50)
    with cluster(str(folder), model__served_name="permuted") as c:
        wrong = exact_match(c, 11, 50)
    print(f"exact match {right:.2f}, with the head permuted {wrong:.2f} (n = 50)")
    assert right >= 0.9
    assert wrong <= 0.02


def test_a_conversation_reuses_its_earlier_turns(ledger: Cluster) -> None:
    text = document(5, 3000, 12)
    first, *rest = make_questions(text, 5, 4, 1)
    messages = [{"role": "user", "content": f"{text.text}\n\n{first.text}"}]
    answers = []
    previous_total = 0
    for question in [first, *rest]:
        if question is not first:
            messages.append({"role": "user", "content": question.text})
        got = ledger.chat(messages, max_tokens=8)
        assert got.cached_tokens >= previous_total - 256, (got.cached_tokens, previous_total)
        previous_total = got.total_tokens
        messages.append({"role": "assistant", "content": got.text})
        answers.append((question.answer, got.text))
    print(answers)
    assert sum(wanted == got for wanted, got in answers) >= len(answers) - 1


def test_usage_adds_up_and_prefill_and_decode_are_two_processes(ledger: Cluster) -> None:
    got = ledger.chat([{"role": "user", "content": "Question: what is the code of bakilo?"}])
    usage = got.raw["usage"]
    assert usage["prompt_cache_hit_tokens"] + usage["prompt_cache_miss_tokens"] == got.prompt_tokens
    pids = {w.worker_id: w.pid for w in ledger.workers()}
    assert len(pids) == 2 and len(set(pids.values())) == 2


def test_the_evidence_names_the_fact(ledger: Cluster) -> None:
    text = document(7, 3000, 12)
    question = make_questions(text, 7, 1, 0)[0]
    content = f"{text.text}\n\n{question.text}"
    got = ledger.chat([{"role": "user", "content": content}], max_tokens=8, evidence=True)
    spans = got.raw["choices"][0]["message"]["evidence"]
    heaviest = max(spans, key=lambda span: span["mass"])
    at = text.text[: text.digits_at[question.name]]
    tokenizer = open_tokenizer("ledger")
    assert tokenizer is not None
    position = len(tokenizer.encode(at))
    print(question, heaviest, position)
    assert heaviest["start"] - 8 <= position <= heaviest["end"] + 8
