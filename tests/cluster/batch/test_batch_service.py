"""The batch service through its client, against a fake model: every call, every refusal."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from cluster.auth.key_file import add_key
from cluster.auth.keys import KeyLimits, new_key
from cluster.batch.intake import LONGEST_ID, LONGEST_QUESTION_BYTES
from cluster.batch.spec import LONGEST_TEMPLATE
from penstock.client import Document, Job, JobOptions, Question, Result
from penstock.errors import (
    AuthenticationError,
    ConflictError,
    InvalidRequestError,
    ModelNotFoundError,
    NotFoundError,
    OverloadedError,
    PenstockError,
    PermissionDeniedError,
    UsageError,
    WorkerUnavailableError,
)
from protos.penstock.batch.v1 import batch_pb2, batch_pb2_grpc
from tests.cluster.batch.batch_harness import Batch, batch_front, documents
from tests.kvstore.redis_server import running_redis


@pytest.fixture
async def batch(tmp_path: Path) -> AsyncIterator[Batch]:
    async with batch_front(tmp_path) as made:
        yield made


async def collected(batch: Batch, job_id: str) -> list[Result]:
    async with batch.client() as client:
        return [result async for result in client.results(job_id, wait=True)]


async def test_each_question_gets_one_answer_with_the_ids_it_came_with(batch: Batch) -> None:
    async with batch.client() as client:
        job = await client.submit(
            [
                Document.from_text("one", [Question("a?", "qa"), "b?"], id="doc-1"),
                Document.from_text("two", ["c?"]),
            ],
            JobOptions(max_tokens=7, metadata={"who": "me"}),
        )
        assert (job.state, job.documents, job.questions) == ("running", 2, 3)
        results = await collected(batch, job.id)
        done = await client.get(job.id)
    print(done, *results, sep="\n")
    ids = {(r.number, r.document_id, r.question_id) for r in results}
    assert ids == {(0, "doc-1", "qa"), (1, "doc-1", "1"), (2, "1", "0")}
    assert all(r.text == "yes" and r.finish_reason == "stop" and not r.error for r in results)
    assert (done.state, done.succeeded, done.failed, done.eta_s) == ("completed", 3, 0, 0.0)
    assert done.metadata == {"who": "me"} and done.model == "fake"
    assert done.usage.prompt_tokens == sum(r.usage.prompt_tokens for r in results) > 0
    prompts = sorted(bytes(r.token_ids).decode() for r in batch.service.requests)
    assert prompts[0] == "user: one\n\nQuestion: a?\nassistant: "
    assert all(r.stop.max_tokens == 7 and r.sampling.greedy for r in batch.service.requests)


async def test_a_document_is_read_first_and_its_end_is_kept(batch: Batch) -> None:
    """Its other questions start when the first one is through, all with the same boundary."""
    batch.service.plan.prefill_pause_s = 0.02
    async with batch.client() as client:
        text = "x" * 1000
        job = await client.submit([Document.from_text(text, [f"{n}?" for n in range(5)])])
        results = [r async for r in client.results(job.id, wait=True)]
    assert results[0].number == 0
    ends = [r.boundaries for r in batch.service.requests]
    print(ends)
    assert all(len("user: " + text + "\n\nQuestion: ") in each for each in ends)


async def test_a_large_upload_arrives_whole_however_it_is_cut(batch: Batch, tmp_path: Path) -> None:
    text = "".join(f"line {n}\n" for n in range(6000))
    file = tmp_path / "doc.txt"
    file.write_text(text)
    async with batch.client() as client:
        job = await client.submit([Document.from_file(file, ["q?"])], idempotency_key="k")
        (result,) = [r async for r in client.results(job.id, wait=True)]
        assert result.document_id == str(file)
        assert text in bytes(batch.service.requests[0].token_ids).decode()

        async def in_small_pieces() -> AsyncIterator[batch_pb2.SubmitRequest]:
            yield batch_pb2.SubmitRequest(job=batch_pb2.JobSpec(idempotency_key="k"))
            yield batch_pb2.SubmitRequest(document=Document.from_file(file, ["q?"]).header())
            raw = text.encode()
            for start in range(0, len(raw), 777):
                yield batch_pb2.SubmitRequest(data=raw[start : start + 777])

        async with grpc.aio.insecure_channel(batch.target) as channel:
            again = await batch_pb2_grpc.BatchStub(channel).Submit(in_small_pieces())
        assert again.existing and again.job.id == job.id


async def test_the_same_key_is_the_same_job_and_other_content_a_conflict(batch: Batch) -> None:
    async with batch.client() as client:
        first = await client.submit(documents(2), idempotency_key="k")
        same = await client.submit(documents(2), idempotency_key="k")
        assert same.id == first.id
        for other, options in ((documents(3), None), (documents(2), JobOptions(seed=3))):
            with pytest.raises(ConflictError, match=first.id):
                await client.submit(other, options, idempotency_key="k")
        assert [j.id for j in await client.list()] == [first.id]
        await client.wait(first.id)
    assert batch.service.opened == 4


async def test_a_watch_from_a_cursor_misses_nothing_and_repeats_nothing(batch: Batch) -> None:
    batch.service.plan.token_pause_s = 0.02
    async with batch.client() as client:
        job = await client.submit(documents(10, 2))
        seen: list[Result] = []
        states: list[Job] = []
        while len(seen) < 20:
            watch = client.watch(job.id, cursor=seen[-1].cursor if seen else 0)
            taken = 0
            async for event in watch:
                if isinstance(event, Job):
                    states.append(event)
                    continue
                seen.append(event)
                taken += 1
                if taken == 7:
                    break
            await watch.aclose()  # type: ignore[attr-defined]
        plain = [r async for r in client.results(job.id)]
    assert [r.cursor for r in seen] == [r.cursor for r in plain]
    assert len({r.number for r in seen}) == 20
    assert [s.answered for s in states] == sorted(s.answered for s in states)


async def test_cancel_and_resume(batch: Batch) -> None:
    batch.service.plan.token_pause_s = 0.1
    async with batch.client() as client:
        job = await client.submit(documents(30, 1))
        async for _ in client.results(job.id, wait=True):
            break
        cancelled = await client.cancel(job.id)
        assert cancelled.state == "cancelled" and 0 < cancelled.answered < 30
        await asyncio.sleep(0.4)
        later = await client.get(job.id)
        opened = batch.service.opened
        assert later.answered == cancelled.answered, "nothing is committed after the cancel"
        await asyncio.sleep(0.3)
        assert batch.service.opened == opened, "nothing is started after the cancel"
        assert (await client.cancel(job.id)).state == "cancelled"
        assert (await client.resume(job.id)).state == "running"
        batch.service.plan.token_pause_s = 0.0
        done = await client.wait(job.id)
        results = [r async for r in client.results(job.id)]
    assert done.state == "completed"
    assert sorted(r.number for r in results) == list(range(30))


async def test_what_is_wrong_with_a_question_is_its_result(batch: Batch) -> None:
    async with batch.client() as client:
        long = Document.from_text("y" * (1 << 16), ["too long?"], id="long")
        not_text = Document.from_text("ok", ["?"], id="binary")
        job = await client.submit([long, not_text, *documents(1)])
        results = {r.document_id: r for r in await collected(batch, job.id)}
        done = await client.get(job.id)
        assert (done.succeeded, done.failed) == (3, 1)
        error = results["long"].error
        print(error)
        assert error and error.code == "context_length_exceeded" and "shorten" in error.message
        again = await client.resume(job.id, retry_failed=True)
        assert (again.state, again.failed) == ("running", 0)
        assert (await client.wait(job.id)).failed == 1


async def test_bytes_that_are_no_text_are_named(batch: Batch, tmp_path: Path) -> None:
    file = tmp_path / "x.bin"
    file.write_bytes(b"abc\xff\xfe")
    async with batch.client() as client:
        job = await client.submit([Document.from_file(file, ["a?", "b?"])])
        errors = [r.error async for r in client.results(job.id, wait=True)]
    assert [e.code for e in errors if e] == ["not_text", "not_text"]


async def test_what_fails_for_a_moment_is_asked_again(batch: Batch) -> None:
    batch.service.plan.refuse = WorkerUnavailableError("the prefill worker is gone")
    async with batch.client() as client:
        job = await client.submit(documents(2, 2))
        await asyncio.sleep(1.0)
        assert (await client.get(job.id)).answered == 0
        batch.service.plan.refuse = None
        done = await client.wait(job.id)
    assert (done.succeeded, done.failed) == (4, 0)


async def test_nothing_is_tried_while_nobody_could_answer(batch: Batch) -> None:
    batch.service.plan.ready = False
    async with batch.client() as client:
        job = await client.submit(documents(1, 1))
        await asyncio.sleep(1.2)
        assert batch.service.opened == 0
        batch.service.plan.ready = True
        assert (await client.wait(job.id)).succeeded == 1


async def test_what_always_fails_is_given_up_with_the_last_reason(tmp_path: Path) -> None:
    async with batch_front(tmp_path, max_claims=2) as batch:
        batch.service.plan.refuse = PenstockError("the engine met a bug")
        async with batch.client() as client:
            job = await client.submit(documents(1, 2))
            results = await collected(batch, job.id)
            done = await client.get(job.id)
    messages = [r.error.message for r in results if r.error]
    print(messages)
    assert done.state == "completed" and done.failed == 2
    assert all("given up after 2 tries" in m and "engine met a bug" in m for m in messages)


async def test_jobs_and_results_outlive_the_front(tmp_path: Path) -> None:
    async with batch_front(tmp_path) as batch:
        batch.service.plan.token_pause_s = 0.1
        async with batch.client() as client:
            job = await client.submit(documents(8, 2), idempotency_key="k")
            taken = []
            async for result in client.results(job.id, wait=True):
                taken.append(result)
                if len(taken) == 5:
                    break
    async with batch_front(tmp_path) as batch, batch.client() as client:
        rest = [r async for r in client.results(job.id, cursor=taken[-1].cursor, wait=True)]
        done = await client.get(job.id)
        again = await client.submit(documents(8, 2), idempotency_key="k")
    numbers = [r.number for r in (*taken, *rest)]
    print(f"{len(taken)} before, {len(rest)} after; the second front ran {batch.service.opened}")
    assert sorted(numbers) == list(range(16)) and done.state == "completed"
    assert batch.service.opened == 16 - (16 - batch.service.opened) <= 11
    assert again.id == job.id


@pytest.mark.parametrize(
    ("parts", "sentence"),
    [
        ([], "send the job first"),
        ([{"data": b"x"}], "without a document"),
        ([{"document": {"questions": [{"text": "?"}]}}], "begins with its job"),
        ([{"job": {}}], "no question"),
        ([{"job": {}}, {"job": {}}], "twice"),
        ([{"job": {}}, {"document": {}}], "has no question"),
        ([{"job": {}}, {"document": {"questions": [{"text": " "}]}}], "is empty"),
        ([{"job": {}}, {"document": {"questions": [{"text": "?"}]}}], "document 0 is empty"),
        ([{"job": {}}, {"document": {"id": "a\nb", "questions": [{"text": "?"}]}}], "line break"),
        ([{"job": {}}, {}], "is empty"),
        ([{"job": {"template": "{document}"}}], "template must hold"),
        ([{"job": {"temperature": 9.0}}], "temperature"),
        ([{"job": {"stop": [""]}}], "stop takes"),
        ([{"job": {"metadata": {"k": "v" * 600}}}], "metadata"),
        ([{"job": {"idempotency_key": "k" * 300}}], "idempotency_key"),
    ],
)
async def test_a_wrong_submission_is_one_sentence_and_leaves_nothing(
    batch: Batch, parts: list[dict[str, object]], sentence: str
) -> None:
    async def send() -> AsyncIterator[batch_pb2.SubmitRequest]:
        for part in parts:
            yield batch_pb2.SubmitRequest(**part)  # type: ignore[arg-type]

    async with grpc.aio.insecure_channel(batch.target) as channel, batch.client() as client:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await batch_pb2_grpc.BatchStub(channel).Submit(send())
        print(caught.value.details())
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert sentence in str(caught.value.details())
        assert await client.list() == []


async def test_limits_of_size_and_number_hold(tmp_path: Path) -> None:
    async with (
        batch_front(
            tmp_path, max_document_bytes=2048, max_job_bytes=6000, max_questions=5
        ) as batch,
        batch.client() as client,
    ):
        for wrong in (
            [Document.from_text("x" * 3000, ["?"])],
            [Document.from_text("x" * 2000, ["?"])] * 4,
            documents(3, 2),
        ):
            with pytest.raises(InvalidRequestError, match="split it"):
                await client.submit(wrong)
        with pytest.raises(ModelNotFoundError, match="fake"):
            await client.submit(documents(1), JobOptions(model="gpt"))
        with pytest.raises(UsageError, match=r"nowhere\.txt"):
            await client.submit([Document.from_file(tmp_path / "nowhere.txt", ["?"])])
        assert await client.list() == []


async def test_an_id_or_a_question_that_is_too_long_is_named(batch: Batch) -> None:
    long = "x" * (LONGEST_ID + 1)
    async with batch.client() as client:
        for wrong in (
            Document.from_text("a", ["?"], id=long),
            Document.from_text("a", [Question("?", long)]),
            Document.from_text("a", ["?" * (LONGEST_QUESTION_BYTES + 1)]),
        ):
            with pytest.raises(InvalidRequestError, match=r"characters|longer than"):
                await client.submit([wrong])
        template = "{document}{question}" + "x" * LONGEST_TEMPLATE
        for options in (
            JobOptions(template=template),
            JobOptions(instructions="x" * (LONGEST_TEMPLATE + 1)),
        ):
            with pytest.raises(InvalidRequestError, match="longer than"):
                await client.submit(documents(1), options)


async def test_one_submission_too_many_is_refused_and_a_silent_one_ended(tmp_path: Path) -> None:
    async with (
        batch_front(tmp_path, max_submissions=1, upload_idle_s=2.0) as batch,
        batch.client(retry_s=0.0) as client,
        grpc.aio.insecure_channel(batch.target) as channel,
    ):
        silent = batch_pb2_grpc.BatchStub(channel).Submit()
        await silent.write(batch_pb2.SubmitRequest(job=batch_pb2.JobSpec()))
        await asyncio.sleep(0.1)
        with pytest.raises(OverloadedError, match="limit"):
            await client.submit(documents(1))
        with pytest.raises(grpc.aio.AioRpcError, match="sent nothing for"):
            await silent
        assert (await client.wait((await client.submit(documents(1))).id)).succeeded == 2


async def test_no_order_of_messages_is_a_failure_of_the_server(batch: Batch) -> None:
    """Two hundred random submissions: accepted or refused with a reason, never half there."""
    rng = random.Random(7)
    pieces: list[dict[str, object]] = [
        {"job": {}},
        {"job": {"template": "{question}{document}", "max_tokens": 1}},
        {"job": {"top_p": 7.0}},
        {"document": {"questions": [{"text": "?"}]}},
        {"document": {"id": "d", "questions": [{"text": "a"}, {"text": "b", "id": "x"}]}},
        {"document": {"uri": "file:///etc/passwd", "questions": [{"text": "?"}]}},
        {"document": {"uri": "\x00"}},
        {"data": b"text"},
        {"data": b""},
        {"data": b"\xff\xfe"},
        {},
    ]
    codes: Counter[str] = Counter()
    async with grpc.aio.insecure_channel(batch.target) as channel, batch.client() as client:
        stub = batch_pb2_grpc.BatchStub(channel)
        for _ in range(200):
            parts: list[dict[str, object]] = [{"job": {}}]
            for _ in range(rng.randrange(1, 4)):
                parts += [rng.choice(pieces[3:5]), {"data": b"text"}]
            for _ in range(rng.randrange(3)):
                parts.insert(rng.randrange(len(parts) + 1), rng.choice(pieces))

            async def send(
                parts: Sequence[dict[str, object]] = tuple(parts),
            ) -> AsyncIterator[object]:
                for part in parts:
                    yield batch_pb2.SubmitRequest(**part)  # type: ignore[arg-type]

            try:
                await stub.Submit(send())
                codes["OK"] += 1
            except grpc.aio.AioRpcError as error:
                codes[error.code().name] += 1
                assert error.details()
        print(codes)
        assert set(codes) <= {"OK", "INVALID_ARGUMENT", "PERMISSION_DENIED"} and codes["OK"] > 5
        jobs = await client.list(limit=100)
        assert len(jobs) == codes["OK"]
        for job in jobs:
            assert (await client.wait(job.id)).state == "completed"


async def test_a_job_goes_on_when_its_redis_was_killed(tmp_path: Path) -> None:
    options = ("--appendonly", "yes", "--appendfsync", "always", "--dir", str(tmp_path))
    with running_redis(*options) as redis:
        async with batch_front(tmp_path, journal_url=redis.url) as batch:
            batch.service.plan.token_pause_s = 0.05
            async with batch.client() as client:
                job = await client.submit(documents(20, 2))
                seen = []
                async for result in client.results(job.id, wait=True):
                    seen.append(result.number)
                    if len(seen) == 10:
                        await asyncio.to_thread(redis.kill)
                        await asyncio.sleep(0.5)
                        await asyncio.to_thread(redis.start)
                done = await client.get(job.id)
    print(seen)
    assert sorted(seen) == list(range(40)) and done.state == "completed"
    assert (done.succeeded, done.failed) == (40, 0)


async def test_a_broken_upload_leaves_no_job(batch: Batch) -> None:
    async with grpc.aio.insecure_channel(batch.target) as channel:
        call = batch_pb2_grpc.BatchStub(channel).Submit()
        await call.write(batch_pb2.SubmitRequest(job=batch_pb2.JobSpec(idempotency_key="k")))
        header = Document.from_text("x", ["?"]).header()
        await call.write(batch_pb2.SubmitRequest(document=header))
        await call.write(batch_pb2.SubmitRequest(data=b"half of"))
        call.cancel()
    async with batch.client() as client:
        job = await client.submit([Document.from_text("half of it", ["?"])], idempotency_key="k")
        assert [j.id for j in await client.list()] == [job.id]
        assert (await client.wait(job.id)).succeeded == 1


async def test_unknown_jobs_are_named(batch: Batch) -> None:
    async with batch.client() as client:
        for call in (client.get("job-x"), client.cancel("job-x"), client.resume("")):
            with pytest.raises(NotFoundError, match="there is no job"):
                await call
        with pytest.raises(NotFoundError):
            async for _ in client.watch("job-x"):
                pass


async def test_keys_scopes_and_tenants(tmp_path: Path) -> None:
    keys = tmp_path / "keys.yaml"
    made = {}
    for name, tenant, scope in (
        ("one", "acme", "batch"),
        ("two", "else", "batch"),
        ("three", "acme", "generate"),
    ):
        fresh = new_key(tenant=tenant, name=name, scopes=[scope])
        made[name] = add_key(keys, lambda _, fresh=fresh: fresh).text  # type: ignore[misc]
    async with batch_front(tmp_path, front={"api_keys_file": str(keys)}) as batch:
        async with batch.client() as nobody, batch.client(api_key=made["three"]) as three:
            with pytest.raises(AuthenticationError):
                await nobody.list()
            with pytest.raises(AuthenticationError):
                await nobody.submit(documents(1))
            with pytest.raises(PermissionDeniedError, match="batch"):
                await three.list()
        async with (
            batch.client(api_key=made["one"]) as one,
            batch.client(api_key=made["two"]) as two,
        ):
            job = await one.submit(documents(1))
            assert await two.list() == []
            with pytest.raises(NotFoundError):
                await two.get(job.id)
            with pytest.raises(NotFoundError):
                async for _ in two.results(job.id):
                    pass
            assert (await one.wait(job.id)).succeeded == 2
            other = await two.submit(documents(1))
            await two.wait(other.id)
    spaces = {r.namespace for r in batch.service.requests}
    assert len(spaces) == 2, "tenants share no block"


async def test_a_key_of_one_request_at_once_still_gets_its_job_done(tmp_path: Path) -> None:
    keys = tmp_path / "keys.yaml"
    fresh = new_key(tenant="t", limits=KeyLimits(concurrent_requests=1))
    key = add_key(keys, lambda _: fresh).text
    async with batch_front(tmp_path, front={"api_keys_file": str(keys)}) as batch:
        batch.service.plan.token_pause_s = 0.05
        async with batch.client(api_key=key) as client:
            job = await client.submit(documents(2, 3))
            done = await client.wait(job.id)
    assert (done.succeeded, done.failed) == (6, 0)


async def test_cost_by_the_operators_prices(tmp_path: Path) -> None:
    async with batch_front(tmp_path, price_uncached=2.0, price_cached=0.5, price_output=8) as batch:
        batch.service.plan.cached_tokens = 100
        async with batch.client() as client:
            job = await client.submit(documents(1, 1))
            done = await client.wait(job.id)
    use = done.usage
    wanted = ((use.prompt_tokens - 100) * 2.0 + 100 * 0.5 + use.completion_tokens * 8) / 1e6
    assert done.cost == pytest.approx(wanted) and done.cached_share > 0


async def test_fronts_share_a_default_journal_that_only_one_of_them_has_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    async with (
        batch_front(tmp_path, journal_url=None) as first,
        batch_front(tmp_path, journal_url=None) as second,
    ):
        assert not (tmp_path / "penstock").exists(), "nothing is made before the first job"
        for batch in (first, second):
            batch.service.plan.token_pause_s = 0.2
        async with first.client() as one, second.client() as other:
            job = await one.submit(documents(60, 1))
            done = await other.wait(job.id)
    print(f"{first.service.opened} questions by the first front, {second.service.opened}")
    assert done.succeeded == 60 and first.service.opened + second.service.opened == 60
    assert second.service.opened > 0


async def test_health_and_reflection_answer(batch: Batch) -> None:
    async with grpc.aio.insecure_channel(batch.target) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        name = "penstock.batch.v1.Batch"
        answer = await health.Check(health_pb2.HealthCheckRequest(service=name))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        asked = reflection_pb2.ServerReflectionRequest(list_services="")
        async for reply in stub.ServerReflectionInfo(iter([asked])):
            assert name in {s.name for s in reply.list_services_response.service}
            break


async def test_too_many_watchers_are_refused_in_words(tmp_path: Path) -> None:
    async with batch_front(tmp_path, max_watchers=1) as batch:
        batch.service.plan.token_pause_s = 0.5
        async with batch.client(retry_s=0.0) as client:
            job = await client.submit(documents(1, 1))
            first = client.watch(job.id)
            await anext(first)
            with pytest.raises(OverloadedError, match="limit"):
                await anext(client.watch(job.id))
