"""Speculative decoding through a whole cluster: the same bits as without, in fewer steps.

The reference is one engine in this process without drafts, each prompt alone in one chunk.
"""

from __future__ import annotations

import json
import random
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
from blake3 import blake3

from model.engine import Segment
from model.open import open_engine
from model.sampler import sample
from penstock.request import Sampling
from penstock.worker import ModelSpec
from tests.cluster.harness import Cluster, cluster
from tests.model import drafted, oracle

LENGTHS = (5, 300)
NEW_TOKENS = 32


@dataclass(frozen=True)
class Case:
    prompt: tuple[int, ...]
    fields: dict[str, Any]
    token_ids: tuple[int, ...]
    digests: tuple[str, ...]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("drafted")
    source = oracle.build("all_kinds", root / "all_kinds")
    # One likely word: a random draft module is then often right.
    found = {kind: drafted.folder_of(root, source, kind, words=1) for kind in drafted.KINDS}
    for folder in found.values():
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 8192}))
    return {kind: str(folder) for kind, folder in found.items()} | {"fake": "fake"}


def reference(model: str, prompts: list[list[int]]) -> list[Case]:
    engine = open_engine(ModelSpec(model=model, num_speculative_tokens=0))
    cases = []
    for number, prompt in enumerate(prompts):
        temperature, seed = ((0.0, 0), (1.0, 40 + number))[number % 2]
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
        fields = {"temperature": temperature, "seed": seed, "max_tokens": NEW_TOKENS}
        cases.append(
            Case(tuple(prompt), fields | {"ignore_eos": True}, tuple(tokens), tuple(digests))
        )
    engine.close()
    return cases


def check(c: Cluster, case: Case, way: str, **more: Any) -> int:
    got = c.complete(list(case.prompt), **case.fields, **more)
    assert got.token_ids == case.token_ids, f"{way}: tokens differ after {len(case.prompt)} tokens"
    assert got.digests == case.digests, f"{way}: logits differ after {len(case.prompt)} tokens"
    return got.cached_tokens


@pytest.mark.parametrize(
    ("kind", "chunk", "drafts"), [("mtp", 100, 3), ("dspark", 391, "auto"), ("fake", 512, 5)]
)
def test_a_drafting_cluster_draws_the_same_bits(
    kind: str, chunk: int, drafts: Any, folders: dict[str, str]
) -> None:
    model = folders[kind]
    rng = random.Random(kind)
    vocab = 250 if kind == "fake" else 128
    cases = reference(model, [[rng.randrange(vocab) for _ in range(n)] for n in LENGTHS])
    settings = {"model__num_speculative_tokens": drafts, "prefill__chunk_tokens": chunk}
    with cluster(model, **settings) as c:
        for case in cases:
            assert check(c, case, "cold") == 0
        for case in cases:
            # Restored by prefill, and warm where decode takes over.
            assert check(c, case, "prefix hit") == len(case.prompt) // 128 * 128
        with ThreadPoolExecutor(len(cases)) as pool:
            every = [
                pool.submit(check, c, case, "beside others", cache_salt=str(i))
                for i, case in enumerate(cases)
            ]
            assert [future.result() for future in every] == [0] * len(cases)
        # A next turn that begins in what drafting decode published.
        case = cases[-1]
        turn2 = [*case.prompt, *case.token_ids, 7, 8, 9]
        warm = c.complete(turn2, max_tokens=20, ignore_eos=True)
        cold = c.complete(turn2, max_tokens=20, ignore_eos=True, cache_salt="turn 2")
        assert warm.cached_tokens >= len(turn2) - 256 > cold.cached_tokens
        assert warm.same_bits(cold)
        assert c.counter("decode", "decode_prompt_tokens_computed_total") == 0
        name = "spec_decode_num_{}_total"
        # The directory shows counters as of the last heartbeat.
        want = (3 * len(cases) * NEW_TOKENS) + 2 * 20
        until = time.monotonic() + 10
        while c.counter("decode", "decode_generated_tokens_total") < want:
            assert time.monotonic() < until
            time.sleep(0.1)
        made, kept = (
            c.counter("decode", name.format(n)) for n in ("draft_tokens", "accepted_tokens")
        )
        assert kept > 0, "no draft was ever right: acceptance was not exercised"
        if kind != "fake":
            assert kept < made, "no draft was ever wrong: rejection was not exercised"
        steps = c.counter("decode", "decode_steps_total")
        shown = "penstock_worker_spec_decode_num_accepted_tokens_per_pos_0_total"
        while shown not in c.client.get("/metrics").text:
            assert time.monotonic() < until, "the front does not show the drafts' counters"
            time.sleep(0.1)
    print(f"{kind}: {int(kept)} of {int(made)} draft tokens stood, {int(steps)} steps")


def test_drafts_that_the_model_cannot_give_stop_the_start(folders: dict[str, str]) -> None:
    with (
        pytest.raises(Exception, match="dspark_block_size is 5"),
        cluster(folders["dspark"], model__num_speculative_tokens=9),
    ):
        pass
