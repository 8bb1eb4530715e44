"""What `Journal` promises, on every backend: the fake, SQLite, a durable Redis."""

from __future__ import annotations

import asyncio
import multiprocessing
import sqlite3
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest

from kvstore.journal.contracts import Claim, File, Job, NewGroup, NewItem, Tokens
from kvstore.journal.journal import RowJournal, open_journal
from kvstore.journal.redis import RedisBackend
from kvstore.journal.sqlite import SqliteBackend
from kvstore.journal.tables import Backend, MemoryBackend
from penstock.errors import (
    ConflictError,
    InvalidRequestError,
    JournalUnavailableError,
    LeaseLostError,
    NotFoundError,
    UsageError,
)
from tests.kvstore.redis_server import RedisServer, running_redis

TENANT = "acme"
RETENTION_S = 1000.0


class Clock:
    def __init__(self) -> None:
        self.now_s = 1_000_000.0

    def __call__(self) -> float:
        return self.now_s


class World:
    """One backend, opened as often as a test likes."""

    def __init__(self, make: Callable[[], Backend]) -> None:
        self._make = make
        self.clock = Clock()
        self._open: list[RowJournal] = []

    def journal(self) -> RowJournal:
        made = RowJournal(self._make(), retention_s=RETENTION_S, clock=self.clock)
        self._open.append(made)
        return made

    async def close(self) -> None:
        for journal in self._open:
            await journal.close()


def make_of(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> Callable[[], Backend]:
    if kind == "fake":
        shared = MemoryBackend()
        return lambda: shared
    if kind == "sqlite":
        return lambda: SqliteBackend(tmp_path / "deep" / "journal.db")
    redis: RedisServer = request.getfixturevalue("shared_redis")
    redis.command(b"FLUSHALL")
    return lambda: RedisBackend(redis.url, require_aof=False)


@pytest.fixture(params=["fake", "sqlite", "redis"])
async def world(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[World]:
    made = World(make_of(request.param, tmp_path, request))
    yield made
    await made.close()


@pytest.fixture
def journal(world: World) -> RowJournal:
    return world.journal()


def new_job(job_id: str = "job-1", **more: object) -> Job:
    job = Job(id=job_id, tenant=TENANT, kind="document", model="m", spec={"a": 1}, created_s=5.0)
    return replace(job, **more)  # type: ignore[arg-type]


def groups(documents: int, questions: int = 2) -> list[NewGroup]:
    return [
        NewGroup(
            {"document": d}, tuple(NewItem(f"{d}-{q}", {"question": q}) for q in range(questions))
        )
        for d in range(documents)
    ]


async def submitted(
    journal: RowJournal, documents: int = 2, questions: int = 2, **more: object
) -> Job:
    job = new_job(**more)
    await journal.begin(job)
    await journal.append(job.id, groups(documents, questions))
    sealed, _ = await journal.seal(job.id, f"digest {documents} {questions}")
    return sealed


async def claim(journal: RowJournal, owner: str = "w", lease_s: float = 30.0) -> Claim:
    found = await journal.claim(owner, models=["m"], lease_s=lease_s)
    assert found is not None
    return found


async def answer(journal: RowJournal, claimed: Claim) -> None:
    for item in claimed.items:
        await journal.commit(claimed, item.number, "succeeded", {"t": item.id}, Tokens(10, 4, 1))


async def test_a_job_from_submission_to_its_last_result(journal: RowJournal) -> None:
    job = await submitted(journal, 2, 2)
    assert (job.state, job.groups, job.items) == ("running", 2, 4)
    first = await claim(journal)
    second = await claim(journal, "other")
    assert (first.group, second.group) == (0, 1)
    assert [i.id for i in first.items] == ["0-0", "0-1"] and first.payload == {"document": 0}
    assert await journal.claim("w", models=["m"], lease_s=30) is None
    await answer(journal, second)
    await answer(journal, first)
    done = await journal.get(job.id, TENANT)
    results = await journal.results(job.id, TENANT)
    print(done, *results, sep="\n")
    assert (done.state, done.succeeded, done.left) == ("completed", 4, 0)
    assert (done.prompt_tokens, done.cached_tokens, done.completion_tokens) == (40, 16, 4)
    assert done.tokens_read == 20, "each document counts once"
    assert [r.item_id for r in results] == ["1-0", "1-1", "0-0", "0-1"]
    cursors = [r.seq for r in results]
    assert cursors == sorted(set(cursors))
    rest = await journal.results(job.id, TENANT, after=cursors[1], limit=1)
    assert [r.item_id for r in rest] == ["0-0"]


async def test_a_claim_that_was_taken_over_can_do_nothing_more(world: World) -> None:
    journal, other = world.journal(), world.journal()
    await submitted(journal, 1, 2)
    old = await claim(journal, "a", lease_s=10)
    await journal.commit(old, 0, "succeeded", {}, Tokens())
    world.clock.now_s += 10.1
    new = await claim(other, "b")
    assert new.token > old.token and [i.number for i in new.items] == [1] and new.claims == 2
    for refused in (
        journal.commit(old, 1, "succeeded", {}, Tokens()),
        journal.renew(old, lease_s=10),
    ):
        with pytest.raises(LeaseLostError):
            await refused
    # Giving back what one does not have takes nothing from who has it.
    await journal.give_back(old, delay_s=0)
    assert await journal.claim("c", models=["m"], lease_s=10) is None
    await other.commit(new, 1, "failed", {"why": "x"}, Tokens())
    done = await journal.get("job-1", TENANT)
    assert (done.state, done.succeeded, done.failed) == ("completed", 1, 1)


async def test_an_expired_lease_that_nobody_took_still_commits(world: World) -> None:
    journal = world.journal()
    await submitted(journal, 1, 1)
    held = await claim(journal, lease_s=1)
    world.clock.now_s += 100
    await answer(journal, held)
    assert (await journal.get("job-1", TENANT)).state == "completed"


async def test_a_renewed_lease_is_kept_and_tells_what_was_read(world: World) -> None:
    journal = world.journal()
    await submitted(journal, 1, 1)
    held = await claim(journal, lease_s=10)
    for tokens in (100, 300, 200):
        world.clock.now_s += 6
        await journal.renew(held, lease_s=10, tokens=tokens)
    assert await journal.claim("w", models=["m"], lease_s=1) is None
    assert (await journal.get("job-1", TENANT)).tokens_read == 300


async def test_the_same_commit_twice_is_one_result(journal: RowJournal) -> None:
    job = await submitted(journal, 1, 1)
    held = await claim(journal)
    first = await journal.commit(held, 0, "succeeded", {"t": 1}, Tokens(5, 0, 1))
    again = await journal.commit(held, 0, "succeeded", {"t": 2}, Tokens(5, 0, 1))
    results = await journal.results(job.id, TENANT)
    assert first == again and [r.result for r in results] == [{"t": 1}]
    assert (await journal.get(job.id, TENANT)).prompt_tokens == 5


async def test_many_at_once_get_each_group_once(world: World) -> None:
    await submitted(world.journal(), 20, 1)
    journals = [world.journal() for _ in range(4)]
    taken: list[int] = []

    async def work(journal: RowJournal) -> None:
        while (found := await journal.claim("w", models=["m"], lease_s=60)) is not None:
            taken.append(found.group)
            await answer(journal, found)

    await asyncio.gather(*(work(j) for j in journals))
    print(taken)
    assert sorted(taken) == list(range(20))
    done = await journals[0].get("job-1", TENANT)
    assert (done.state, done.succeeded) == ("completed", 20)


async def test_an_idempotency_key_gives_the_same_job_or_a_conflict(journal: RowJournal) -> None:
    first = await submitted(journal, 2, 2, key="k")
    again = new_job("job-2", key="k")
    await journal.begin(again)
    await journal.append(again.id, groups(2, 2))
    same, created = await journal.seal(again.id, first.digest)
    assert (same.id, created) == (first.id, False)
    other = new_job("job-3", key="k")
    await journal.begin(other)
    await journal.append(other.id, groups(1, 1))
    with pytest.raises(ConflictError, match="job-1"):
        await journal.seal(other.id, "another")
    foreign = await submitted(journal, 2, 2, job_id="job-4", key="k", tenant="else")
    assert foreign.id == "job-4", "keys belong to their tenant"
    # The answer to a seal was lost: asked again it is the same.
    assert (await journal.seal(first.id, first.digest))[1]
    listed = await journal.list_jobs(TENANT, limit=10)
    assert [j.id for j in listed] == ["job-1"]


async def test_a_draft_is_seen_by_nobody_and_goes(world: World) -> None:
    journal = world.journal()
    await journal.begin(new_job())
    await journal.append("job-1", groups(1))
    await journal.put_blob("job-1/0", 0, b"x")
    with pytest.raises(NotFoundError):
        await journal.get("job-1", TENANT)
    assert await journal.claim("w", models=["m"], lease_s=1) is None
    assert await journal.sweep() == 0
    world.clock.now_s += 3601
    while await journal.sweep():
        continue
    with pytest.raises(NotFoundError, match="expired"):
        await journal.seal("job-1", "d")
    with pytest.raises(NotFoundError):
        await journal.read_blob("job-1/0", 1)


async def test_an_empty_job_is_refused(journal: RowJournal) -> None:
    await journal.begin(new_job())
    with pytest.raises(InvalidRequestError, match="question"):
        await journal.seal("job-1", "d")


async def test_cancel_stops_and_resume_goes_on_where_it_was(journal: RowJournal) -> None:
    job = await submitted(journal, 2, 1)
    held = await claim(journal)
    await answer(journal, held)
    late = await claim(journal)
    cancelled = await journal.cancel(job.id, TENANT)
    assert (cancelled.state, cancelled.succeeded) == ("cancelled", 1)
    with pytest.raises(LeaseLostError, match="cancelled"):
        await answer(journal, late)
    assert await journal.claim("w", models=["m"], lease_s=1) is None
    resumed = await journal.resume(job.id, TENANT, retry_failed=False)
    assert resumed.state == "running" and resumed.seq > cancelled.seq > job.seq
    # Its claim is still the newest, so its work counts.
    await answer(journal, late)
    done = await journal.get(job.id, TENANT)
    assert done.state == "completed" and len(await journal.results(job.id, TENANT)) == 2


async def test_failed_items_run_again_only_when_asked(journal: RowJournal) -> None:
    job = await submitted(journal, 2, 2)
    for _ in range(2):
        held = await claim(journal)
        await journal.commit(held, held.items[0].number, "failed", {"why": "bad"}, Tokens())
        await journal.commit(held, held.items[1].number, "succeeded", {}, Tokens())
    assert (await journal.get(job.id, TENANT)).state == "completed"
    assert (await journal.resume(job.id, TENANT, retry_failed=False)).state == "completed"
    before = await journal.results(job.id, TENANT)
    again = await journal.resume(job.id, TENANT, retry_failed=True)
    assert (again.state, again.failed, again.left) == ("running", 0, 2)
    for _ in range(2):
        await answer(journal, await claim(journal))
    done = await journal.get(job.id, TENANT)
    after = await journal.results(job.id, TENANT)
    assert (done.state, done.succeeded, done.failed) == ("completed", 4, 0)
    assert len({r.number for r in after}) == len(after) == 4
    assert min(r.seq for r in after if r.item_id.endswith("-0")) > max(r.seq for r in before)


async def test_given_back_work_waits_and_counts_only_if_told(world: World) -> None:
    journal = world.journal()
    await submitted(journal, 1, 1)
    await journal.give_back(await claim(journal), delay_s=5, counted=False)
    assert await journal.claim("w", models=["m"], lease_s=1) is None
    world.clock.now_s += 5.1
    second = await claim(journal)
    assert second.claims == 1
    await journal.give_back(second, delay_s=0)
    with pytest.raises(LeaseLostError):
        await answer(journal, second)
    assert (await claim(journal)).claims == 2


async def test_jobs_take_turns_and_other_models_are_left_alone(journal: RowJournal) -> None:
    for name in ("job-1", "job-2"):
        await submitted(journal, 3, 1, job_id=name)
    await submitted(journal, 3, 1, job_id="job-3", model="elsewhere")
    turns = [(await claim(journal)).job.id for _ in range(4)]
    print(turns)
    assert sorted(turns[:2]) == ["job-1", "job-2"] and turns[2:] == turns[:2]
    assert (await journal.claim("w", models=["elsewhere"], lease_s=1)).job.id == "job-3"  # type: ignore[union-attr]


async def test_finished_jobs_are_forgotten_after_their_time_with_all_rows(world: World) -> None:
    journal = world.journal()
    job = await submitted(journal, 3, 2, key="k")
    await journal.cancel(job.id, TENANT)
    world.clock.now_s += RETENTION_S - 1
    assert await journal.sweep() == 0
    world.clock.now_s += 2
    while await journal.sweep():
        continue
    with pytest.raises(NotFoundError):
        await journal.get(job.id, TENANT)
    assert await journal.list_jobs(TENANT, limit=5) == []
    left = await journal._run(
        lambda tx: [k for c in b"JlrkgpiebFfx" for k, _ in tx.rows(bytes([c]) + b"/")]
    )
    print("rows left", left)
    assert left == []
    assert (await submitted(journal, 3, 2, job_id="job-9", key="k")).id == "job-9"


async def test_documents_go_when_all_their_questions_have_succeeded(journal: RowJournal) -> None:
    job = new_job()
    await journal.begin(job)
    for number in range(2):
        await journal.put_blob(f"job-1/{number}", 0, b"first ")
        await journal.put_blob(f"job-1/{number}", 1, b"second")
    made = [replace(g, blob=f"job-1/{i}", chunks=2) for i, g in enumerate(groups(2, 1))]
    await journal.append(job.id, made)
    await journal.seal(job.id, "d")
    held = await claim(journal)
    assert await journal.read_blob(held.blob, held.chunks) == b"first second"
    await answer(journal, held)
    with pytest.raises(NotFoundError):
        await journal.read_blob(held.blob, held.chunks)
    other = await claim(journal)
    await journal.commit(other, other.items[0].number, "failed", {}, Tokens())
    assert await journal.read_blob(other.blob, other.chunks) == b"first second", "to run again"


async def test_other_tenants_see_nothing(journal: RowJournal) -> None:
    await submitted(journal)
    for call in (
        journal.get("job-1", "else"),
        journal.cancel("job-1", "else"),
        journal.resume("job-1", "else", retry_failed=True),
        journal.results("job-1", "else"),
        journal.list_jobs("else", limit=5, after="job-1"),
    ):
        with pytest.raises(NotFoundError):
            await call
    assert await journal.list_jobs("else", limit=5) == []


async def test_lists_are_newest_first_in_pages(journal: RowJournal) -> None:
    for number in range(5):
        await submitted(journal, 1, 1, job_id=f"job-{number}", created_s=float(number))
    first = await journal.list_jobs(TENANT, limit=2)
    rest = await journal.list_jobs(TENANT, limit=10, after=first[-1].id)
    assert [j.id for j in [*first, *rest]] == [f"job-{n}" for n in (4, 3, 2, 1, 0)]


async def test_files_are_seen_when_whole_and_until_they_expire(world: World) -> None:
    journal = world.journal()
    now_s = world.clock.now_s
    file = File("file-1", TENANT, "in.jsonl", "batch", -1, 0, now_s, now_s + 60)
    await journal.add_file(file)
    await journal.put_blob("file-1", 0, b"abc")
    with pytest.raises(NotFoundError):
        await journal.file("file-1", TENANT)
    whole = replace(file, size_bytes=3, chunks=1, expires_s=now_s + 600)
    await journal.add_file(whole)
    world.clock.now_s += 120
    assert await journal.sweep() == 0
    assert await journal.file("file-1", TENANT) == whole
    assert await journal.list_files(TENANT, limit=3) == [whole]
    assert await journal.read_blob("file-1", 1) == b"abc"
    with pytest.raises(NotFoundError):
        await journal.file("file-1", "else")
    await journal.delete_file("file-1", TENANT)
    assert await journal.list_files(TENANT, limit=3) == []
    while await journal.sweep():
        continue
    with pytest.raises(NotFoundError):
        await journal.read_blob("file-1", 1)


# Backends


async def test_a_redis_that_keeps_nothing_is_refused(shared_redis: RedisServer) -> None:
    journal = open_journal(shared_redis.url)
    with pytest.raises(UsageError, match="appendonly yes"):
        await journal.get("job-1", TENANT)
    await journal.close()


async def test_a_killed_durable_redis_comes_back_with_every_commit(tmp_path: Path) -> None:
    options = ("--appendonly", "yes", "--appendfsync", "always", "--dir", str(tmp_path))
    with running_redis(*options) as redis:
        journal = open_journal(redis.url)
        job = await submitted(journal, 3, 1)
        held = await claim(journal)
        await answer(journal, held)
        redis.kill()
        with pytest.raises(JournalUnavailableError, match="in Redis at"):
            await journal.get(job.id, TENANT)
        redis.start()
        got = await journal.get(job.id, TENANT)
        print(got)
        assert got.succeeded == 1 and len(await journal.results(job.id, TENANT)) == 1
        await journal.close()


@pytest.mark.parametrize("url", ["", "x", "sqlite:///", "postgres://h", "redis://h:port"])
def test_a_wrong_url_is_one_sentence_without_its_password(url: str) -> None:
    with pytest.raises(UsageError, match="journal URL must look like"):
        open_journal(url)


async def test_a_file_that_is_no_journal_is_named(tmp_path: Path) -> None:
    path = tmp_path / "j.db"
    path.write_bytes(b"this is a letter to my aunt, and no database" * 100)
    journal = open_journal(f"sqlite:///{path}")
    with pytest.raises(UsageError, match="is no journal"):
        await journal.get("job-1", TENANT)
    await journal.close()
    assert path.read_bytes().startswith(b"this is a letter")


async def test_a_newer_journal_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "j.db"
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version=7")
    journal = open_journal(f"sqlite:///{path}")
    with pytest.raises(UsageError, match="another version"):
        await journal.get("job-1", TENANT)
    await journal.close()


def _work(path: str, name: str, out: multiprocessing.Queue[list[int]]) -> None:
    async def run() -> list[int]:
        journal = open_journal(f"sqlite:///{path}")
        taken = []
        while (found := await journal.claim(name, models=["m"], lease_s=60)) is not None:
            taken.append(found.group)
            await answer(journal, found)
        await journal.close()
        return taken

    out.put(asyncio.run(run()))


async def test_processes_share_one_file(tmp_path: Path) -> None:
    path = tmp_path / "j.db"
    journal = open_journal(f"sqlite:///{path}")
    await submitted(journal, 30, 1)
    context = multiprocessing.get_context("spawn")
    out: multiprocessing.Queue[list[int]] = context.Queue()
    workers = [context.Process(target=_work, args=(str(path), f"w{n}", out)) for n in range(2)]
    for worker in workers:
        worker.start()
    taken = [await asyncio.to_thread(out.get, timeout=60) for _ in workers]
    for worker in workers:
        worker.join(30)
    print(taken)
    assert sorted(chain.from_iterable(taken)) == list(range(30))
    assert (await journal.get("job-1", TENANT)).state == "completed"
    assert oct(path.stat().st_mode)[-3:] == "600"
    await journal.close()
