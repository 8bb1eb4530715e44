"""Documents, names and the tokenizer: the contract the model is trained on."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training import documents, filler

NAME = re.compile(r"(?:[bdfgklmnprstvz][aeiou]){3,5}")


@given(st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_a_document_holds_each_fact_once_and_says_where(seed: int) -> None:
    document = documents.make_document(seed, tokens_at_least=400, facts=7, count=len)
    assert len(document.facts) == 7
    for name, code in document.facts.items():
        assert NAME.fullmatch(name)
        assert document.text.count(f"the code of {name} is {code}.") == 1
        at = document.digits_at[name]
        assert document.text[at : at + 5] == code + "."
        assert document.text[:at].endswith(f"the code of {name} is ")


@given(st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_questions_have_the_asked_numbers_and_right_answers(seed: int) -> None:
    document = documents.make_document(seed, tokens_at_least=400, facts=7, count=len)
    questions = documents.make_questions(document, seed, 5, 3)
    answers = [q.answer for q in questions]
    assert answers.count(documents.UNKNOWN) == 3
    assert len({q.name for q in questions}) == 8
    for q in questions:
        assert q.answer == document.facts.get(q.name, documents.UNKNOWN)
        assert q.text == f"Question: what is the code of {q.name}?"


def test_a_seed_gives_the_same_document_again() -> None:
    first, second = (
        documents.make_document(11, tokens_at_least=3000, facts=9, count=len) for _ in range(2)
    )
    assert first == second
    assert first != documents.make_document(12, tokens_at_least=3000, facts=9, count=len)


def test_a_document_has_at_least_the_asked_tokens() -> None:
    def count(text: str) -> int:
        return len(text.split())

    document = documents.make_document(3, tokens_at_least=5000, facts=12, count=count)
    assert count(document.text) >= 5000


def test_about_a_tenth_of_all_names_is_held_out() -> None:
    rng = random.Random(0)
    share = sum(documents.held_out(documents.make_name(rng)) for _ in range(5000)) / 5000
    assert 0.08 < share < 0.12


@pytest.mark.parametrize("kind", [kind for kind, _ in filler.KINDS])
def test_every_filler_kind_is_deterministic_and_has_about_the_asked_size(kind: object) -> None:
    assert callable(kind)
    first, second = kind(random.Random(5), 900), kind(random.Random(5), 900)
    assert first == second
    assert 200 <= len(first) <= 2000


def test_documents_need_no_torch() -> None:
    code = "import sys, training.documents; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_seed_gives_the_same_names_in_every_process() -> None:
    """The order of a set of strings differs between processes; nothing drawn may depend on it."""
    code = (
        "import random; from training.documents import draw_names, make_name; r = random.Random(1);"
        "taken = {make_name(r) for _ in range(50)};"
        "print(draw_names(r, 40, near=0.9, taken=taken))"
    )
    told = [
        subprocess.run(
            [sys.executable, "-c", code], check=True, capture_output=True, text=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    ]  # fmt: skip
    assert told[0] == told[1] and len(told[0]) > 200
