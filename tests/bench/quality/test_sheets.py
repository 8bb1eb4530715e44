"""Sheets of the evaluation: facts stand where they are said to, names are held out, filler is apart
from training's.
"""

from __future__ import annotations

import random
import re
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.quality import filler as evaluation_filler
from bench.quality import sheets
from bench.quality.sheets import DEPTHS, Kind, Question, Sheet
from penstock.errors import UsageError
from penstock.tokenizer import open_tokenizer
from training import documents
from training import filler as training_filler

TOKENIZER = open_tokenizer("ledger")
assert TOKENIZER is not None


def count(text: str) -> int:
    assert TOKENIZER is not None
    return len(TOKENIZER.encode(text))


def values(text: str, name: str) -> list[str]:
    """Every value that the text gives for a name, in order."""
    return re.findall(rf"the code of {name} is (\d{{4}})\.", text)


def check(sheet: Sheet, question: Question) -> None:
    assert documents.held_out(question.name)
    found = values(sheet.text, question.name)
    if question.fact is None:
        assert question.expected == documents.UNKNOWN and not found
        return
    begin, end = question.fact
    assert sheet.text[begin:end] == f"the code of {question.name} is {question.expected}."
    assert found == [*question.earlier, question.expected]


@given(st.sampled_from(sheets.SUITES), st.integers(512, 6000), st.integers(0, 10**6))
@settings(max_examples=12, deadline=None)
def test_every_fact_stands_where_the_sheet_says(suite: str, tokens: int, seed: int) -> None:
    made = list(sheets.sheets(suite, tokens, 12, seed, count))
    assert made == list(sheets.sheets(suite, tokens, 12, seed, count))
    for sheet in made:
        assert len({q.name for q in sheet.questions}) == len(sheet.questions)
        for question in sheet.questions:
            check(sheet, question)
            whole = count(f"{sheet.text}\n\n{question.text}")
            assert tokens - 100 - tokens // 20 <= whole <= tokens + 16


@given(st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_needles_lie_at_their_depths(seed: int) -> None:
    sheet = sheets.needle_sheet(4000, seed, count)
    needles = [q for q in sheet.questions if q.kind is Kind.NEEDLE]
    assert sorted(q.depth or 0.0 for q in needles) == list(DEPTHS)
    for question in needles:
        assert question.fact is not None and question.depth is not None
        assert abs(question.fact[0] / len(sheet.text) - question.depth) < 0.12
    kinds = [q.kind for q in sheet.questions]
    for kind in (Kind.STRANGER, Kind.NEIGHBOUR, Kind.CODELESS):
        assert kinds.count(kind) == 4
    for question in sheet.questions:
        if question.kind is Kind.CODELESS:
            assert question.name in sheet.text


def test_a_thousand_facts_need_a_document_that_holds_them() -> None:
    assert [f for f in sheets.FACTS if sheets.fits(32_768, f)] == [16, 256, 1000]
    assert [f for f in sheets.FACTS if sheets.fits(1024, f)] == [16]
    with pytest.raises(UsageError, match="greater length"):
        sheets.many_sheet(600, 1, count, facts=256)


def shingles(text: str, size: int = 6) -> set[tuple[str, ...]]:
    words = re.findall(r"[a-z]{2,}", text.lower())
    return set(zip(*(words[i:] for i in range(size)), strict=False))


def test_the_filler_shares_no_text_with_training() -> None:
    ours, theirs = (
        "".join(module.segment(random.Random(f"{seed}"), 4000) for seed in range(60))
        for module in (evaluation_filler, training_filler)
    )
    common = shingles(ours) & shingles(theirs)
    print(f"{len(shingles(ours))} runs of six words here, {len(common)} of them in training's")
    assert not common
    shared = set(evaluation_filler.WORDS) & set(training_filler.WORDS)
    assert not shared, shared


def test_sheets_need_no_torch() -> None:
    code = "import sys, bench.quality.run, bench.quality.plot; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
