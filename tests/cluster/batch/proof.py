"""Jobs through every crash: the same answers, each once, no document computed twice for nothing.

    .venv/bin/python -m tests.cluster.batch.proof --documents 500 --json FILE

`penstock serve ledger` as a user starts it. One job runs undisturbed. Then the same documents run
again under another cache salt, so that nothing of the first run helps, while the front, a prefill
worker, a decode worker and the client (`penstock batch results`) are killed with SIGKILL, and the
index in Redis is flushed. The client goes on from the last cursor that it had written.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx

from cluster.launchers.common import free_port
from penstock.client import BatchClient, Document, Job, JobOptions, Question
from penstock.tokenizer import open_tokenizer
from tests.cluster.breakage import Served, serving, wait_for
from tests.kvstore.redis_server import running_redis
from training.documents import make_document, make_questions

QUESTIONS = 4
MAX_DOCUMENTS = 4
"""In work at once in a front: the default of `batch.max_documents`."""
_COUNTER = re.compile(
    r"^penstock_worker_prefill_((?:re)?computed)_tokens_total(\{[^}]*\}) (\S+)$", re.MULTILINE
)
_PID = re.compile(r"^penstock_worker_pid(\{[^}]*\}) (\S+)$", re.MULTILINE)


@dataclass
class Run:
    """One job's outcome."""

    seconds: float
    results: int
    numbers: int
    """Different ones."""
    right: int
    """Answers that are the document's facts."""
    computed_by_usage: int
    """Prompt tokens that no cache had, as the results' usage tells."""
    computed_by_metric: float
    """As prefill workers counted them, over all their lives, as far as they could tell."""
    recomputed_by_metric: float
    """Of these: in blocks that the store had already."""
    texts: dict[int, str] = field(default_factory=dict, repr=False)
    uncached: dict[int, int] = field(default_factory=dict, repr=False)


@dataclass
class Report:
    documents: int
    questions: int
    document_tokens: int
    longest_document: int
    kills: list[str]
    client_restarts: int
    undisturbed: Run
    disturbed: Run

    @property
    def same(self) -> bool:
        return self.undisturbed.texts == self.disturbed.texts

    @property
    def extra_tokens(self) -> float:
        """What the kills cost in computed prompt tokens, by the workers' metric."""
        more = self.disturbed.computed_by_metric - self.undisturbed.computed_by_metric
        return max(more, self.disturbed.recomputed_by_metric)

    @property
    def most_extra_tokens(self) -> int:
        """A kill can cost what was in work: every document of a front once."""
        return len(self.kills) * MAX_DOCUMENTS * self.longest_document

    def facts(self) -> dict[str, Any]:
        found = asdict(self) | {"same": self.same, "extra_tokens": self.extra_tokens}
        for run in ("undisturbed", "disturbed"):
            del found[run]["texts"], found[run]["uncached"]
        return found


class Counted(threading.Thread):
    """Reads the workers' counters through /metrics while it can, one life of a process at a time.
    A worker that is killed takes what it counted since its last heartbeat with it.
    """

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self._url = url
        self._most: dict[tuple[str, str, str], float] = {}
        self._done = threading.Event()
        self.start()

    def run(self) -> None:
        while not self._done.wait(0.1):
            self.look()

    def look(self) -> None:
        try:
            text = httpx.get(f"{self._url}/metrics", timeout=5.0).text
        except httpx.HTTPError:
            return
        pids = dict(_PID.findall(text))
        for name, labels, value in _COUNTER.findall(text):
            life = (name, labels, pids.get(labels, ""))
            self._most[life] = max(self._most.get(life, 0.0), float(value))

    def total(self, name: str = "computed") -> float:
        return sum(value for (kind, _, _), value in self._most.items() if kind == name)

    def stop(self) -> None:
        self._done.set()
        self.join(10)


def make_documents(count: int, tokens: int) -> tuple[list[Document], dict[int, str], list[int]]:
    """Documents, the right answer of each question by its number, tokens of each document."""
    tokenizer = open_tokenizer("ledger")
    assert tokenizer is not None
    made, answers, sizes = [], {}, []
    for number in range(count):
        document = make_document(
            number, tokens_at_least=tokens, facts=6, count=lambda t: len(tokenizer.encode(t))
        )
        asked = make_questions(document, number, QUESTIONS - 1, 1)
        for place, question in enumerate(asked):
            answers[number * QUESTIONS + place] = question.answer
        questions = [Question(question.text.removeprefix("Question: ")) for question in asked]
        made.append(Document.from_text(document.text, questions, id=f"doc-{number}"))
        sizes.append(len(tokenizer.encode(document.text)))
    return made, answers, sizes


def pids_of(served: Served, part: str) -> list[int]:
    return [pid for pid, command in served.pids.items() if f"-m {part}" in command]


class Client:
    """`penstock batch results --wait` in a process of its own, its output in a file."""

    def __init__(self, target: str, job_id: str, file: Path) -> None:
        self._target = target
        self._job_id = job_id
        self._file = file
        self.starts = 0
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        """Goes on from the last whole line."""
        cursor, whole = 0, b""
        if self._file.exists():
            whole = self._file.read_bytes()
            whole = whole[: whole.rfind(b"\n") + 1]
            lines = whole.splitlines()
            cursor = json.loads(lines[-1])["cursor"] if lines else 0
        # What was cut off in the middle of a line comes again.
        self._file.write_bytes(whole)
        with self._file.open("ab") as out:
            server = ("--server", self._target, "--wait", "--cursor", str(cursor))
            self._process = subprocess.Popen(
                [sys.executable, "-m", "cluster.cli", "batch", "results", self._job_id, *server],
                stdout=out,
                stderr=subprocess.DEVNULL,
            )
        self.starts += 1

    @property
    def lines(self) -> int:
        return self._file.read_bytes().count(b"\n")

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait(10)

    def wait(self, timeout_s: float) -> int:
        assert self._process is not None
        return self._process.wait(timeout_s)


def job_run(
    file: Path, started: float, computed: float, recomputed: float, answers: dict[int, str]
) -> Run:
    rows = [json.loads(line) for line in file.read_bytes().splitlines()]
    texts = {row["number"]: row.get("text", f"error: {row.get('error')}") for row in rows}
    uncached = {
        row["number"]: row["usage"]["prompt_tokens"] - row["usage"]["cached_tokens"] for row in rows
    }
    return Run(
        seconds=round(time.monotonic() - started, 1),
        results=len(rows),
        numbers=len(texts),
        right=sum(texts.get(number) == answer for number, answer in answers.items()),
        computed_by_usage=sum(uncached.values()),
        computed_by_metric=computed,
        recomputed_by_metric=recomputed,
        texts=texts,
        uncached=uncached,
    )


def prove(
    folder: Path,
    *,
    documents: int,
    tokens: int,
    lease_s: float = 30.0,
    shares: tuple[float, float, float] = (0.15, 0.35, 0.55),
    timeout_s: float = 3000.0,
) -> Report:
    """`shares` of the job after which front, prefill and decode worker are killed."""
    made, answers, sizes = make_documents(documents, tokens)
    port = free_port()
    target = f"127.0.0.1:{port}"
    flags = ("--launcher", "local", "--grpc-port", str(port))
    flags += ("--journal-url", f"sqlite:///{folder}/journal.db")
    with (
        running_redis() as redis,
        serving(
            *flags,
            *("--redis-url", redis.url),
            model="ledger",
            PENSTOCK_BATCH__LEASE_S=str(lease_s),
        ) as served,
        BatchClient(target) as client,
    ):
        counted = Counted(served.url)

        def submit(salt: str) -> Job:
            options = JobOptions(max_tokens=8, cache_salt=salt)
            return client.submit(made, options, idempotency_key=salt)

        started = time.monotonic()
        quiet = Client(target, submit("undisturbed").id, folder / "undisturbed.jsonl")
        assert quiet.wait(timeout_s) == 0
        settle(counted)
        before, again = counted.total(), counted.total("recomputed")
        undisturbed = job_run(folder / "undisturbed.jsonl", started, before, again, answers)

        started = time.monotonic()
        job = submit("disturbed")
        loud = Client(target, job.id, folder / "disturbed.jsonl")
        kills = []
        for part, share in zip(("cluster.front", "prefill", "decode"), shares, strict=True):
            reach(client, job.id, share, timeout_s)
            (pid,) = pids_of(served, part)
            os.kill(pid, signal.SIGKILL)
            kills.append(f"{part} killed at {share:.0%}")
            if part == "cluster.front":
                redis.command(b"FLUSHALL")
                kills.append(f"index flushed at {share:.0%}")
            if part == "prefill":
                loud.kill()
                loud.start()
        assert loud.wait(timeout_s) == 0
        settle(counted)
        disturbed = job_run(
            folder / "disturbed.jsonl",
            started,
            counted.total() - before,
            counted.total("recomputed") - again,
            answers,
        )
        # Submitted again under its key it is the same job, and nothing runs.
        assert submit("disturbed").id == job.id
        counted.stop()
    return Report(
        documents=documents,
        questions=QUESTIONS,
        document_tokens=sum(sizes),
        longest_document=max(sizes),
        kills=kills,
        client_restarts=loud.starts - 1,
        undisturbed=undisturbed,
        disturbed=disturbed,
    )


def reach(client: BatchClient, job_id: str, share: float, timeout_s: float) -> None:
    """Until so much of the job is answered."""

    def far() -> bool:
        job = client.get(job_id)
        return job.answered >= share * job.questions

    wait_for(f"{share:.0%} of the job", far, within_s=timeout_s)


def settle(counted: Counted) -> None:
    """Workers tell their counters with their heartbeats; the front mirrors them."""
    total = -1.0
    while total != counted.total():
        total = counted.total()
        time.sleep(2.5)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=500)
    parser.add_argument("--tokens", type=int, default=1500, help="least tokens of a document")
    parser.add_argument("--lease-s", type=float, default=30.0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = prove(
            Path(folder),
            documents=options.documents,
            tokens=options.tokens,
            lease_s=options.lease_s,
        )
    text = json.dumps(report.facts(), indent=1)
    print(text)
    if options.json is not None:
        options.json.write_text(text + "\n")
    wanted = options.documents * QUESTIONS
    run = report.disturbed
    whole = run.results == run.numbers == wanted and report.same
    return 0 if whole and report.extra_tokens <= report.most_extra_tokens else 1


if __name__ == "__main__":
    raise SystemExit(main())
