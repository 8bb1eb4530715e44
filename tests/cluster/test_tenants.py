"""Two tenants with one document share nothing, down to the ids of blocks in the store."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.auth.key_file import add_key
from cluster.auth.keys import new_key
from penstock.identity import Chain, namespace
from penstock.peers import TOKEN_KEY
from protos.penstock.kv.v1 import kv_pb2, kv_pb2_grpc
from tests.cluster.breakage import prompt_of
from tests.cluster.harness import Cluster, cluster

CLUSTER_KEY = "one secret of this cluster"
BLOCKS = 4
SEEDS = itertools.count(101)
"""Each test asks about a document of its own."""


@dataclass
class Town:
    """A cluster with two tenants; the first has two keys."""

    cluster: Cluster
    keys: dict[str, str]

    def ask(self, who: str, prompt: list[int], **fields: Any) -> dict[str, Any]:
        body = {"model": "fake", "prompt": prompt, "max_tokens": 2, "temperature": 0} | fields
        headers = {"authorization": f"Bearer {self.keys[who]}"} | body.pop("headers", {})
        answer = self.cluster.client.post("/v1/completions", json=body, headers=headers)
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def cached(self, who: str, prompt: list[int], **fields: Any) -> int:
        usage = self.ask(who, prompt, **fields)["usage"]
        return int(usage["prompt_tokens_details"]["cached_tokens"])

    def ids(self, tenant: str, prompt: list[int], salt: str = "") -> tuple[bytes, ...]:
        """Of the prompt's blocks, computed here from the published definition."""
        prints = {bytes(worker.fingerprint) for worker in self.cluster.workers()}
        (fingerprint,) = prints
        secret = hashlib.sha256(CLUSTER_KEY.encode()).digest()
        return Chain.start(fingerprint, namespace(secret, tenant, salt)).extend(prompt).blocks

    def present(self, ids: tuple[bytes, ...]) -> list[bool]:
        with self.cluster.store() as (channel, signed):
            stub = kv_pb2_grpc.KvStoreStub(channel)
            answer = stub.Has(kv_pb2.HasRequest(ids=ids), timeout=5, metadata=signed)
        return [byte != 0 for byte in answer.present]


@pytest.fixture(scope="module")
def town(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Town]:
    path = tmp_path_factory.mktemp("keys") / "keys.yaml"
    keys = {
        who: add_key(path, lambda taken, who=who: new_key(tenant=who[:4], taken=taken)).text
        for who in ("acme", "acme-2", "bolt")
    }
    with cluster("fake", front__api_keys_file=str(path), front__cluster_key=CLUSTER_KEY) as running:
        yield Town(running, keys)


def document() -> list[int]:
    return prompt_of(BLOCKS * 256 + 40, next(SEEDS))


def test_the_same_document_of_two_tenants_shares_no_block(town: Town) -> None:
    prompt = document()
    acme, bolt = town.ids("acme", prompt), town.ids("bolt", prompt)
    assert len(acme) == BLOCKS and not set(acme) & set(bolt)
    first = town.ask("acme", prompt)
    assert town.present(acme) == [True] * BLOCKS and town.present(bolt) == [False] * BLOCKS
    assert town.cached("acme", prompt) > 0 and town.cached("acme-2", prompt) > 0
    other = town.ask("bolt", prompt)
    print("acme", first["usage"], "bolt", other["usage"])
    assert other["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert other["usage"]["prompt_cache_miss_tokens"] == len(prompt)
    assert town.present(bolt) == [True] * BLOCKS
    assert other["choices"][0]["text"] == first["choices"][0]["text"]


def test_nothing_that_a_client_sends_makes_it_another_tenant(town: Town) -> None:
    prompt = document()
    assert town.cached("acme", prompt) == 0
    ours = town.ask("acme", prompt)
    assert ours["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    tries: list[dict[str, Any]] = [
        {"headers": {"x-tenant": "acme", "x-penstock-tenant": "acme"}},
        {"headers": {"openai-organization": "acme", "openai-project": "acme"}},
        {"headers": {"x-request-id": ours["id"]}},
        {"user": "acme"},
        {"cache_salt": "acme"},
    ]
    for fields in tries:
        # A prompt of its own each time: bolt's own cache must not hide acme's.
        mine = document()
        town.ask("acme", mine)
        assert town.cached("bolt", mine, **fields) == 0, fields


def test_a_salt_parts_one_tenants_requests(town: Town) -> None:
    prompt = document()
    town.ask("acme", prompt, cache_salt="one")
    assert town.cached("acme", prompt, cache_salt="two") == 0
    assert town.cached("acme", prompt) == 0
    assert town.cached("acme", prompt, cache_salt="one") > 0
    assert town.present(town.ids("acme", prompt, "one")) == [True] * BLOCKS


def test_both_at_once_many_times_never_meet(town: Town) -> None:
    prompts = [document() for _ in range(6)]
    jobs = [(who, prompt) for prompt in prompts for who in ("acme", "bolt")]
    with ThreadPoolExecutor(6) as pool:
        cached = list(pool.map(lambda job: town.cached(*job), jobs))
    print(cached)
    assert cached == [0] * len(jobs)


def test_a_tenants_key_opens_nothing_in_the_store(town: Town) -> None:
    prompt = document()
    town.ask("bolt", prompt)
    get = kv_pb2.GetRequest(ids=town.ids("bolt", prompt)).SerializeToString()
    path = "/penstock.kv.v1.KvStore/Get"
    tries: list[list[tuple[str, str]]] = [
        [],
        [("authorization", f"Bearer {town.keys['bolt']}")],
        [(TOKEN_KEY, town.keys["bolt"])],
        [(TOKEN_KEY, CLUSTER_KEY)],
        [(TOKEN_KEY, "bolt"), ("x-tenant", "bolt")],
    ]
    for metadata in tries:
        with grpc.insecure_channel(town.cluster.store_address) as channel:
            with pytest.raises(grpc.RpcError) as refused:
                list(channel.unary_stream(path)(get, timeout=5, metadata=metadata))
            assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED


def test_what_is_open_to_all_names_no_tenant(town: Town) -> None:
    for path in ("/health", "/ready", "/version", "/metrics", "/openapi.json"):
        text = town.cluster.client.get(path).text
        assert "acme" not in text and "bolt" not in text, path


NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)


@settings(max_examples=300)
@given(
    one=st.tuples(NAMES, st.text(st.characters(codec="utf-8"), max_size=20)),
    two=st.tuples(NAMES, st.text(st.characters(codec="utf-8"), max_size=20)),
)
def test_no_tenant_and_salt_give_anothers_namespace(
    one: tuple[str, str], two: tuple[str, str]
) -> None:
    key = b"k" * 32
    assert (namespace(key, *one) == namespace(key, *two)) == (one == two)


def test_a_tenants_name_can_hold_no_zero_byte() -> None:
    from cluster.auth.keys import KeyRecord

    good = new_key(tenant="acme").record.model_dump()
    for name in ("acme\0", "acme\0salt", "", "Acme", "a/b", "a" * 65, "../x"):
        with pytest.raises(ValueError, match="tenant"):
            KeyRecord.model_validate(good | {"tenant": name})


def test_the_key_file_is_all_that_names_tenants(town: Town) -> None:
    """A key that is revoked while the cluster runs is out within about a second."""
    import time

    from cluster.auth.key_file import revoke_key
    from cluster.auth.keys import id_of

    path = Path(str(town.cluster.config.front.api_keys_file))
    late = add_key(path, lambda taken: new_key(tenant="late", taken=taken)).text
    deadline = time.monotonic() + 10
    headers = {"authorization": f"Bearer {late}"}
    while town.cluster.client.get("/v1/models", headers=headers).status_code != 200:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    revoke_key(path, str(id_of(late)))
    while town.cluster.client.get("/v1/models", headers=headers).status_code != 401:
        assert time.monotonic() < deadline
        time.sleep(0.1)
