"""`penstock run-batch` as a user types it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.batch.test_openai_batches import jsonl, line


def run_batch(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cluster.cli", "run-batch", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_a_file_of_requests_is_answered_in_its_order(tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    text = line(1, url="/v1/completions") | {
        "body": {"model": "fake", "prompt": "abc", "max_tokens": 2}
    }
    source.write_bytes(jsonl(line(0, max_tokens=2), text, line(2, model="other")))
    done = run_batch("fake", "-i", str(source), "-o", str(target))
    rows = [json.loads(row) for row in target.read_bytes().splitlines()]
    print(done.stdout, done.stderr)
    assert done.returncode == 1 and "2 of 3 requests answered" in done.stdout
    assert [row["custom_id"] for row in rows] == ["r0", "r2", "r1"], "by endpoint, then in order"
    assert [row["response"]["status_code"] for row in rows] == [200, 404, 200]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [(b"", "holds no request"), (b"{}\n", "line 1"), (jsonl(line(0), line(0)), "line 2")],
)
def test_a_wrong_file_is_named_before_anything_starts(
    tmp_path: Path, content: bytes, sentence: str
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(content)
    done = run_batch("fake", "-i", str(source), "-o", str(tmp_path / "out"))
    assert done.returncode == 2 and sentence in done.stderr, done.stderr
    lost = run_batch("fake", "-i", str(tmp_path / "none"), "-o", str(tmp_path / "out"))
    assert lost.returncode == 2 and "cannot read" in lost.stderr
