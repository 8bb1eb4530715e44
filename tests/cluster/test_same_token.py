"""Promise 1: the same token, bit for bit, whichever way it came (architecture.md, issue 2, stage
4).

The reference is one engine in this process: each prompt alone, in one chunk. Every cluster must
return the same token ids and the same BLAKE3 digests of the float32 logits that they were drawn
from.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3

from model.engine import Segment
from model.open import open_engine
from model.sampler import sample
from penstock.request import Sampling
from penstock.tokenizer import open_tokenizer
from penstock.worker import ModelSpec
from tests.cluster.harness import Cluster, Completion, cluster
from tests.kvstore.redis_server import running_redis
from tests.model import oracle
from training.documents import make_document, make_questions

NEW_TOKENS = 6
PROMPTS = 20
WHOLE = 8192


@dataclass(frozen=True)
class Case:
    """One prompt, how it is sampled, and what the reference drew."""

    prompt: list[int]
    temperature: float
    seed: int
    token_ids: tuple[int, ...]
    digests: tuple[str, ...]

    def fields(self) -> dict[str, Any]:
        return {
            "temperature": self.temperature,
            "seed": self.seed,
            "max_tokens": NEW_TOKENS,
            "ignore_eos": True,
        }


def lengths(rng: random.Random) -> list[int]:
    """200 to 6,000 tokens, with exact multiples of 128 and 256 and their neighbours among them."""
    special = [200, 255, 256, 257, 384, 1023, 1024, 2048, 2176, 6000]
    return special + [int(200 * 30 ** rng.random()) for _ in range(PROMPTS - len(special))]


def reference(spec: ModelSpec, prompts: list[list[int]]) -> list[Case]:
    engine = open_engine(spec)
    cases = []
    for number, prompt in enumerate(prompts):
        temperature, seed = (0.0, 0) if number % 2 else (1.0, 1000 + number)
        sampling = Sampling(temperature=temperature, seed=seed)
        sequence = engine.open(len(prompt) + NEW_TOKENS)
        engine.forward([Segment(sequence, prompt)])
        tokens, digests = [], []
        for _ in range(NEW_TOKENS):
            row = engine.logits([sequence]).row(0)
            digests.append(blake3(row.cast("B")).digest()[:8].hex())
            tokens.append(sample(row, sampling, position=sequence.position))
            engine.forward([Segment(sequence, [tokens[-1]])])
        engine.release(sequence)
        cases.append(Case(prompt, temperature, seed, tuple(tokens), tuple(digests)))
    engine.close()
    return cases


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Name of a model -> what `--model` takes. Random ones are written once."""
    built: dict[str, str] = {}

    def get(name: str) -> str:
        if name == "ledger":
            return name
        if name not in built:
            folder = tmp_path_factory.mktemp(name)
            oracle.build(name, folder)
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(
                json.dumps(config | {"max_position_embeddings": 16384})
            )
            built[name] = str(folder)
        return built[name]

    return get


@pytest.fixture(scope="module")
def cases(folders: Callable[[str], str]) -> Callable[[str], list[Case]]:
    known: dict[str, list[Case]] = {}

    def get(name: str) -> list[Case]:
        if name not in known:
            rng = random.Random(f"same token {name}")
            model = folders(name)
            known[name] = reference(ModelSpec(model=model), _prompts(rng, model, name))
        return known[name]

    return get


def _prompts(rng: random.Random, model: str, name: str) -> list[list[int]]:
    if name != "ledger":
        vocab = json.loads((Path(model) / "config.json").read_text())["vocab_size"]
        return [[rng.randrange(vocab) for _ in range(n)] for n in lengths(rng)]
    tokenizer = open_tokenizer("ledger")
    assert tokenizer is not None
    prompts = []
    for number, n in enumerate(lengths(rng)):
        document = make_document(
            number, tokens_at_least=n, facts=6, count=lambda text: len(tokenizer.encode(text))
        )
        question = make_questions(document, number, 1, 0)[0]
        tail = tokenizer.encode(f"\n\n{question.text}\nAnswer: the code of {question.name} is ")
        # Cut to the very length: the borders are what this test is about.
        prompts.append([*tokenizer.encode(document.text)[: n - len(tail)], *tail])
    return prompts


def check(case: Case, got: Completion, way: str) -> None:
    assert got.token_ids == case.token_ids, f"{way}: tokens differ at {len(case.prompt)} tokens"
    assert got.digests == case.digests, f"{way}: logits differ at {len(case.prompt)} tokens"


def run_all(c: Cluster, cases: list[Case], way: str) -> list[Completion]:
    answers = []
    for case in cases:
        got = c.complete(case.prompt, **case.fields())
        check(case, got, way)
        answers.append(got)
    return answers


def hits(c: Cluster, cases: list[Case]) -> None:
    """Prefix hits at every kind of boundary, on a store that has seen all the prompts."""
    again = run_all(c, cases, "the whole prompt again")
    for case, got in zip(cases, again, strict=True):
        n = len(case.prompt)
        assert got.cached_tokens == n - n % 128, f"{got.cached_tokens} of {n} cached"
    longest = max(cases, key=lambda case: len(case.prompt))
    prompt = longest.prompt
    for length in (len(prompt) - 300, len(prompt) // 256 * 256 - 256, 4096, 1920, 129, 128):
        # A beginning of a known prompt, and a fork of it: the cold answer is that of a cluster
        # that cannot have seen it, by another cache salt.
        fork = [*prompt[:length], *reversed(prompt[:40])]
        warm = c.complete(fork, max_tokens=4, ignore_eos=True)
        cold = c.complete(fork, max_tokens=4, ignore_eos=True, cache_salt=f"cold {length}")
        assert cold.cached_tokens == 0
        assert warm.same_bits(cold), f"a fork at {length} differs between warm and cold"
    # What decode published is reused as well: the answer becomes part of the next prompt.
    case = cases[0]
    first = c.complete(case.prompt, max_tokens=300, ignore_eos=True)
    turn2 = [*case.prompt, *first.token_ids, *case.prompt[:20]]
    warm = c.complete(turn2, max_tokens=4, ignore_eos=True)
    cold = c.complete(turn2, max_tokens=4, ignore_eos=True, cache_salt="turn 2")
    assert warm.cached_tokens >= first.total_tokens - 256 and cold.cached_tokens == 0
    assert warm.same_bits(cold)


def beside(c: Cluster, cases: list[Case]) -> None:
    """Each of some prompts beside three others, all cold and all at once."""
    groups = [cases[i : i + 4] for i in range(0, len(cases), 4)]
    with ThreadPoolExecutor(4) as pool:
        for number, group in enumerate(groups):
            futures = [
                pool.submit(
                    c.complete, case.prompt, **case.fields(), cache_salt=f"beside {number} {i}"
                )
                for i, case in enumerate(group)
            ]
            for case, future in zip(group, futures, strict=True):
                check(case, future.result(), "beside three others")


@pytest.fixture(scope="module")
def redis_url() -> Iterator[str]:
    with running_redis() as server:
        yield server.url


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["ledger", "all_kinds", "ledger_like"])
@pytest.mark.parametrize(
    ("chunk", "index"), [(391, "embedded"), (128, "redis"), (512, "embedded"), (WHOLE, "redis")]
)
def test_every_path_of_the_local_launcher_draws_the_same_bits(
    name: str,
    chunk: int,
    index: str,
    folders: Callable[[str], str],
    cases: Callable[[str], list[Case]],
    redis_url: str,
) -> None:
    settings: dict[str, Any] = {"prefill__chunk_tokens": chunk}
    if index == "redis":
        settings["kvstore__redis_url"] = redis_url
    wanted = cases(name)
    with cluster(folders(name), **settings) as c:
        cold = run_all(c, wanted, f"cold, chunks of {chunk}, {index} index")
        assert all(got.cached_tokens == 0 for got in cold)
        if chunk in (391, 128):
            hits(c, wanted)
        if chunk == 391:
            beside(c, wanted)
        assert c.counter("decode", "decode_prompt_tokens_computed_total") == 0
    print(f"{name}: {len(wanted)} prompts, chunks of {chunk}, {index}: equal bit for bit")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.ray
def test_the_ray_launcher_draws_the_same_bits(
    folders: Callable[[str], str], cases: Callable[[str], list[Case]]
) -> None:
    wanted = cases("ledger")
    with cluster("ledger", launcher="ray", prefill__chunk_tokens=512) as c:
        run_all(c, wanted, "Ray, cold")
        hits(c, wanted)
        beside(c, wanted)
