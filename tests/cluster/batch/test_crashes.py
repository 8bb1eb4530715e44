"""The proof (`proof.py`) in a size that every run of the tests can pay for."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import httpx
import pytest

from cluster.launchers.common import free_port
from penstock.client import BatchClient, Document, JobOptions
from tests.cluster.batch.proof import QUESTIONS, pids_of, prove
from tests.cluster.breakage import serving, wait_for

DOCUMENTS = 12
TOKENS = 500
CHUNK = 512
# A question and what is left of its document behind the last multiple of 128 tokens.
MOST_UNCACHED_TOKENS = 128 + 64
COMPUTED = re.compile(
    r"^penstock_worker_prefill_computed_tokens_total(?:\{[^}]*\})? (\S+)$", re.MULTILINE
)


def test_kills_of_front_workers_and_client_and_a_flushed_index_change_no_answer(
    tmp_path: Path,
) -> None:
    report = prove(
        tmp_path, documents=DOCUMENTS, tokens=TOKENS, lease_s=2.0, shares=(0.15, 0.4, 0.4)
    )
    print(report.facts())
    quiet, loud = report.undisturbed, report.disturbed
    wanted = DOCUMENTS * QUESTIONS
    for run in (quiet, loud):
        assert run.results == run.numbers == wanted, "each once"
    assert report.same and len(report.kills) == 4 and report.client_restarts == 1
    assert quiet.right >= 0.9 * wanted, "answers, not noise"
    # Undisturbed, the workers computed what the results say, each document once.
    assert quiet.computed_by_metric == quiet.computed_by_usage
    assert quiet.recomputed_by_metric == 0
    for document in range(DOCUMENTS):
        first, *others = (quiet.uncached[document * QUESTIONS + q] for q in range(QUESTIONS))
        assert first >= TOKENS and max(others) <= MOST_UNCACHED_TOKENS
    assert report.extra_tokens <= report.most_extra_tokens


@pytest.mark.parametrize("part", ["cluster.front", "prefill"])
def test_a_long_document_goes_on_at_the_last_committed_chunk(tmp_path: Path, part: str) -> None:
    """No state that is kept for other requests lies before the kill: only the chunk's own helps."""
    port = free_port()
    flags = ("--launcher", "local", "--grpc-port", str(port))
    flags += ("--max-num-batched-tokens", str(CHUNK))
    flags += ("--journal-url", f"sqlite:///{tmp_path}/journal.db")
    env = {"PENSTOCK_MODEL__FAKE_PREFILL_TOKENS_PER_S": "2000", "PENSTOCK_BATCH__LEASE_S": "1"}
    text = "".join(f"line {number} of the document\n" for number in range(300))
    with serving(*flags, **env) as served, BatchClient(f"127.0.0.1:{port}") as client:
        options = JobOptions(max_tokens=2)
        job = client.submit([Document.from_text(text, ["a?", "b?"])], options)
        wait_for("some chunks", lambda: client.get(job.id).tokens_read >= 5 * CHUNK, within_s=30)
        read = client.get(job.id).tokens_read
        (pid,) = pids_of(served, part)
        os.kill(pid, signal.SIGKILL)
        first, second = sorted(client.results(job.id, wait=True), key=lambda r: r.number)
        told = httpx.get(f"{served.url}/metrics", timeout=10).text
    computed = sum(float(count) for count in COMPUTED.findall(told))
    print(f"{part} killed after {read} tokens; then {first.usage}, {second.usage}, {computed}")
    assert read < len(text) - 2048, "killed in the middle"
    if part == "prefill":
        # The same request went on at another worker, whose counters began with it.
        assert computed <= first.usage.prompt_tokens - (read - CHUNK) + MOST_UNCACHED_TOKENS
    else:
        assert first.usage.cached_tokens >= read - CHUNK
    assert second.usage.cached_tokens >= len(text) - 128
