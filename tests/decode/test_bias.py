"""Penalties, bias and log probabilities through the decode worker's door, with drafts and without;
compared with the plain loop in numpy.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.engine import Segment
from model.fake import EOS, VOCAB, FakeEngine, FakeSettings
from model.sampler import logprobs, sample
from penstock.errors import InvalidRequestError
from penstock.request import Sampling
from protos.penstock.worker.v1 import worker_pb2
from tests.decode.pair import NAMESPACE, Pair, failure, pair, prompt_of

PROMPT = prompt_of(300)


def plain_loop(sampling: Sampling, tokens: int) -> list[int]:
    engine = FakeEngine()
    sequence = engine.open(len(PROMPT) + tokens)
    engine.forward([Segment(sequence, PROMPT)])
    answer: list[int] = []
    for _ in range(tokens):
        row = np.array(engine.logits([sequence]).row(0), dtype=np.float64)
        for token, count in Counter(answer).items():
            row[token] -= sampling.presence_penalty + sampling.frequency_penalty * count
        for token, bias in sampling.logit_bias:
            row[token] += bias
        row[EOS] = -np.inf
        answer.append(sample(row.astype(np.float32), sampling, position=sequence.position))
        engine.forward([Segment(sequence, answer[-1:])])
    return answer


async def generate(workers: Pair, sampling: Sampling, tokens: int, **fields: Any) -> Any:
    """Tokens and log probabilities of one answer."""
    prompt = workers.prompt(PROMPT)
    await workers.read(PROMPT, prompt=prompt)
    call = workers.decode_stub.Generate(
        worker_pb2.GenerateRequest(
            prompt=prompt,
            sampling=worker_pb2.Sampling(
                temperature=sampling.temperature,
                seed=sampling.seed,
                frequency_penalty=sampling.frequency_penalty,
                presence_penalty=sampling.presence_penalty,
                logit_bias=dict(sampling.logit_bias),
            ),
            max_tokens=tokens,
            min_tokens=tokens,
            prefill_timeout_ms=20_000,
            admission_timeout_ms=10_000,
            lease_ttl_ms=5000,
            **fields,
        ),
        timeout=30,
    )
    ids, told = [], []
    async for event in call:
        if event.WhichOneof("event") == "tokens":
            ids += event.tokens.token_ids
            told += event.tokens.logprobs
    return ids, told


@pytest.mark.parametrize("drafts", [0, 4])
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.0, frequency_penalty=0.7),
        Sampling(seed=4, presence_penalty=-1.5, frequency_penalty=0.3),
        Sampling(seed=4, logit_bias=((101, 7.5), (120, -100.0)), presence_penalty=2.0),
    ],
    ids=["greedy", "drawn", "biased"],
)
async def test_answers_are_those_of_the_plain_loop(sampling: Sampling, drafts: int) -> None:
    async with pair(settings=FakeSettings(draft_tokens=drafts)) as workers:
        ids, told = await generate(workers, sampling, 80)
        assert ids == plain_loop(sampling, 80)
        assert not told
        if drafts:
            assert workers.decode.batch.drafts.accepted_tokens > 0
        await workers.settles()


@pytest.mark.parametrize("drafts", [0, 4])
async def test_log_probabilities_are_the_models_own(drafts: int) -> None:
    sampling = Sampling(seed=4, logit_bias=((101, 7.5),), frequency_penalty=1.0)
    async with pair(settings=FakeSettings(draft_tokens=drafts)) as workers:
        ids, told = await generate(workers, sampling, 40, top_logprobs=3)
    engine = FakeEngine()
    sequence = engine.open(len(PROMPT) + 40)
    engine.forward([Segment(sequence, PROMPT)])
    assert len(told) == len(ids) == 40
    for token, one in zip(ids, told, strict=True):
        row = np.array(engine.logits([sequence]).row(0), dtype=np.float64)
        want = row - np.log(np.exp(row).sum())
        assert one.logprob == pytest.approx(want[token], abs=1e-5)
        assert list(one.top_ids) == list(np.argsort(-want, kind="stable")[:3])
        assert list(one.top_logprobs) == pytest.approx(want[list(one.top_ids)], abs=1e-5)
        engine.forward([Segment(sequence, [token])])


async def test_a_bias_outside_the_vocabulary_is_refused_by_name() -> None:
    async with pair() as workers:
        call = workers.ask(PROMPT)
        await call
        request = worker_pb2.GenerateRequest(
            prompt=worker_pb2.Prompt(
                request_id="r",
                token_ids=PROMPT,
                namespace=NAMESPACE,
                fingerprint=workers.decode_engine.info.fingerprint,
            ),
            sampling=worker_pb2.Sampling(logit_bias={VOCAB: 1.0}),
            max_tokens=1,
        )
        error = await failure(_read(workers, request))
    assert isinstance(error, InvalidRequestError)
    assert error.param == "logit_bias"


async def _read(workers: Pair, request: worker_pb2.GenerateRequest) -> None:
    from tests.decode.pair import mapped_errors

    with mapped_errors():
        async for _ in workers.decode_stub.Generate(request, timeout=10):
            pass


LOGITS = st.lists(st.sampled_from([-30.0, -1.5, 0.0, 0.5, 8.0, 700.0, -700.0]), min_size=1)


@given(row=LOGITS, data=st.data())
def test_the_likeliest_come_first_and_ties_by_id(row: list[float], data: st.DataObject) -> None:
    token = data.draw(st.integers(0, len(row) - 1))
    top = data.draw(st.integers(0, 20))
    told = logprobs(np.array(row, dtype=np.float32), token, top=top)
    order = sorted(range(len(row)), key=lambda i: (-row[i], i))[:top]
    assert [i for i, _ in told.top] == order
    values = np.array(row) - max(row)
    values -= np.log(np.exp(values).sum())
    assert told.logprob == pytest.approx(values[token])
    assert [lp for _, lp in told.top] == pytest.approx([values[i] for i in order])
