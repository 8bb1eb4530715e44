"""Any order of steps by several workers, with crashes and expired leases, against a model."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from kvstore.journal.contracts import Claim, Job, NewGroup, NewItem, Tokens
from kvstore.journal.journal import RowJournal
from kvstore.journal.redis import RedisBackend
from kvstore.journal.sqlite import SqliteBackend
from kvstore.journal.tables import Backend, MemoryBackend
from penstock.errors import ConflictError, LeaseLostError
from tests.kvstore.redis_server import RedisServer

T = TypeVar("T")
LEASE_S = 10.0
WORKERS = 3


class Machine(RuleBasedStateMachine):
    """One job after another may be submitted; three workers fight over them."""

    def backend(self) -> Backend:
        raise NotImplementedError

    @initialize()
    def start(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.now_s = 1000.0
        self.journals = [self.opened() for _ in range(WORKERS)]
        self.submitted = 0
        self.held: list[Claim] = []
        self.holder: dict[tuple[str, int], tuple[int, float]] = {}
        """(job, group) -> newest token and when its lease ends."""
        self.jobs: dict[str, str] = {}
        self.items: dict[str, int] = {}
        self.results: dict[tuple[str, int], tuple[int, str]] = {}
        self.keys: dict[str, tuple[str, str]] = {}

    def opened(self) -> RowJournal:
        return RowJournal(self.backend(), clock=lambda: self.now_s)

    def run_(self, call: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(call)

    @rule(documents=st.integers(1, 3), questions=st.integers(1, 3), key=st.sampled_from(["", "k"]))
    def submit(self, documents: int, questions: int, key: str) -> None:
        self.submitted += 1
        job_id, digest = f"job-{self.submitted}", f"{documents}x{questions}"
        journal = self.journals[0]
        self.run_(journal.begin(Job(job_id, "t", "d", "m", {}, self.now_s, key)))
        items = tuple(NewItem(str(q), {}) for q in range(questions))
        self.run_(journal.append(job_id, [NewGroup({}, items) for _ in range(documents)]))
        try:
            job, created = self.run_(journal.seal(job_id, digest))
        except ConflictError:
            assert self.keys[key][1] != digest
            return
        if key and key in self.keys:
            assert (job.id, created) == (self.keys[key][0], False)
            assert self.keys[key][1] == digest
            return
        assert created and job.id == job_id
        self.jobs[job_id], self.items[job_id] = "running", documents * questions
        if key:
            self.keys[key] = (job_id, digest)

    @rule(worker=st.integers(0, WORKERS - 1))
    def claim(self, worker: int) -> None:
        claimed = self.run_(self.journals[worker].claim("w", models=["m"], lease_s=LEASE_S))
        if claimed is None:
            return
        place = (claimed.job.id, claimed.group)
        token, until_s = self.holder.get(place, (0, 0.0))
        assert self.jobs[claimed.job.id] == "running"
        assert until_s <= self.now_s, "claimed while another lease holds"
        assert claimed.token > token
        pending = [i.number for i in claimed.items]
        assert pending and not any((claimed.job.id, n) in self.results for n in pending)
        self.holder[place] = (claimed.token, self.now_s + LEASE_S)
        self.held.append(claimed)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), failed=st.booleans())
    def commit(self, data: st.DataObject, failed: bool) -> None:
        claimed = data.draw(st.sampled_from(self.held))
        item = data.draw(st.sampled_from(claimed.items))
        place, number = (claimed.job.id, claimed.group), item.number
        journal = self.journals[data.draw(st.integers(0, WORKERS - 1))]
        status: Any = "failed" if failed else "succeeded"
        before = self.results.get((claimed.job.id, number))
        fenced = self.holder[place][0] != claimed.token
        stopped = self.jobs[claimed.job.id] == "cancelled"
        try:
            seq = self.run_(journal.commit(claimed, number, status, {}, Tokens(3, 2, 1)))
        except LeaseLostError:
            assert fenced or stopped or before is not None
            return
        assert not fenced and not stopped
        if before is not None:
            assert before[0] == seq
            return
        self.results[(claimed.job.id, number)] = (seq, status)
        done = sum(1 for job, _ in self.results if job == claimed.job.id)
        if done == self.items[claimed.job.id]:
            self.jobs[claimed.job.id] = "completed"

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def renew(self, data: st.DataObject) -> None:
        claimed = data.draw(st.sampled_from(self.held))
        place = (claimed.job.id, claimed.group)
        try:
            self.run_(self.journals[1].renew(claimed, lease_s=LEASE_S, tokens=2))
        except LeaseLostError:
            stopped = self.jobs[claimed.job.id] == "cancelled"
            assert stopped or self.holder[place][0] != claimed.token
            return
        assert self.holder[place][0] == claimed.token
        self.holder[place] = (claimed.token, self.now_s + LEASE_S)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), delay_s=st.sampled_from([0.0, 4.0]))
    def give_back(self, data: st.DataObject, delay_s: float) -> None:
        claimed = data.draw(st.sampled_from(self.held))
        self.run_(self.journals[2].give_back(claimed, delay_s=delay_s))
        place = (claimed.job.id, claimed.group)
        if self.holder[place][0] == claimed.token:
            self.holder[place] = (claimed.token + 1, self.now_s + delay_s)

    @rule(seconds=st.sampled_from([1.0, 5.0, 11.0]))
    def wait(self, seconds: float) -> None:
        self.now_s += seconds

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        job_id = data.draw(st.sampled_from(sorted(self.jobs)))
        job = self.run_(self.journals[0].cancel(job_id, "t"))
        if self.jobs[job_id] == "running":
            self.jobs[job_id] = "cancelled"
        assert job.state == self.jobs[job_id]

    @precondition(lambda self: self.jobs)
    @rule(data=st.data(), retry=st.booleans())
    def resume(self, data: st.DataObject, retry: bool) -> None:
        job_id = data.draw(st.sampled_from(sorted(self.jobs)))
        job = self.run_(self.journals[0].resume(job_id, "t", retry_failed=retry))
        if retry:
            self._forget_failures(job_id)
        done = sum(1 for name, _ in self.results if name == job_id)
        if done < self.items[job_id]:
            self.jobs[job_id] = "running"
        assert job.state == self.jobs[job_id]

    def _forget_failures(self, job_id: str) -> None:
        failed = [
            k for k, (_, status) in self.results.items() if k[0] == job_id and status[0] == "f"
        ]
        for key in failed:
            del self.results[key]
        # Whether a finished document's old claim still counts is the journal's business.
        for place, (token, until_s) in list(self.holder.items()):
            if place[0] == job_id and failed:
                row = self.run_(self.journals[0]._read(lambda tx, p=place: _group(tx, p)))
                self.holder[place] = (row["token"], min(until_s, row["until_s"]))
                assert row["token"] >= token

    @rule(worker=st.integers(0, WORKERS - 1))
    def crash(self, worker: int) -> None:
        """Its process is gone in the middle of whatever it was; another one opens the journal."""
        self.journals[worker] = self.opened()

    @invariant()
    def every_result_is_there_once(self) -> None:
        for job_id, state in getattr(self, "jobs", {}).items():
            job = self.run_(self.journals[0].get(job_id, "t"))
            found = self.run_(self.journals[0].results(job_id, "t"))
            expected = {n: r for (name, n), r in self.results.items() if name == job_id}
            assert {r.number: (r.seq, r.status) for r in found} == expected
            assert len(found) == len(expected) == job.answered
            assert [r.seq for r in found] == sorted(r.seq for r in found)
            assert job.state == state
            # Tokens count every attempt that was committed, so a retry adds to them.
            assert job.prompt_tokens >= 3 * len(expected)

    def teardown(self) -> None:
        for journal in getattr(self, "journals", []):
            self.run_(journal.close())
        if hasattr(self, "loop"):
            self.loop.close()


def _group(tx: Any, place: tuple[str, int]) -> dict[str, Any]:
    row: dict[str, Any] = tx.load(b"g/%s/%010d" % (place[0].encode(), place[1]))
    return row


def check(backend: Any, examples: int) -> None:
    """Runs the machine over `backend()`, which is asked for a fresh store by `fresh`."""
    machine = type("Over", (Machine,), {"backend": backend})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=30,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_the_fake() -> None:
    def backend(self: Any) -> Backend:
        if not hasattr(self, "shared"):
            self.shared = MemoryBackend()
        shared: Backend = self.shared
        return shared

    check(backend, 40)


def test_sqlite() -> None:
    def backend(self: Any) -> Backend:
        if not hasattr(self, "folder"):
            self.folder = tempfile.TemporaryDirectory()
        return SqliteBackend(Path(self.folder.name) / "journal.db")

    check(backend, 8)


@pytest.mark.usefixtures("shared_redis")
def test_redis(shared_redis: RedisServer) -> None:
    def backend(self: Any) -> Backend:
        if not hasattr(self, "begun"):
            shared_redis.command(b"FLUSHALL")
            self.begun = True
        return RedisBackend(shared_redis.url, require_aof=False)

    check(backend, 8)
