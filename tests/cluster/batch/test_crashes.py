"""The proof (`proof.py`) in a size that every run of the tests can pay for."""

from __future__ import annotations

from pathlib import Path

from tests.cluster.batch.proof import QUESTIONS, prove

DOCUMENTS = 12
TOKENS = 500
# A question and what is left of its document behind the last multiple of 128 tokens.
MOST_UNCACHED_TOKENS = 128 + 64


def test_front_workers_and_client_killed_on_the_way_change_no_answer(tmp_path: Path) -> None:
    report = prove(
        tmp_path, documents=DOCUMENTS, tokens=TOKENS, lease_s=2.0, shares=(0.15, 0.4, 0.4)
    )
    print(report.facts())
    quiet, loud = report.undisturbed, report.disturbed
    wanted = DOCUMENTS * QUESTIONS
    for run in (quiet, loud):
        assert run.results == run.numbers == wanted, "each once"
    assert report.same and len(report.kills) == 3 and report.client_restarts == 1
    assert quiet.right >= 0.9 * wanted, "answers, not noise"
    # Undisturbed, the workers computed what the results say, each document once.
    assert quiet.computed_by_metric == quiet.computed_by_usage
    assert quiet.recomputed_by_metric == 0
    for document in range(DOCUMENTS):
        first, *others = (quiet.uncached[document * QUESTIONS + q] for q in range(QUESTIONS))
        assert first >= TOKENS and max(others) <= MOST_UNCACHED_TOKENS
    assert report.extra_tokens <= report.most_extra_tokens
