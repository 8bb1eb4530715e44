"""A whole cluster for tests, used through its public doors: HTTP, gRPC stat, process ids."""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx

from cluster.config import ClusterConfig, resolve
from cluster.contracts import Launcher
from cluster.launch import launcher_for
from cluster.launchers.common import free_port
from penstock.peers import PEER_NAME, TOKEN_KEY, Peers
from protos.penstock.kv.v1 import kv_pb2, kv_pb2_grpc

TIMEOUT_S = 120.0


@dataclass
class Cluster:
    """A running cluster and the launcher that owns it."""

    config: ClusterConfig
    url: str
    store_address: str
    launcher: Launcher
    client: httpx.Client
    peers: Peers

    def complete(self, prompt: list[int] | str, **fields: Any) -> Completion:
        body = {"model": self.config.served_name, "prompt": prompt, "temperature": 0} | fields
        body |= {"logits_digest": True}
        answer = self.client.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        return _completion(answer.json())

    def chat(self, messages: list[dict[str, str]], **fields: Any) -> Completion:
        body = {"model": self.config.served_name, "messages": messages, "temperature": 0} | fields
        answer = self.client.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200, answer.text
        return _completion(answer.json())

    def stat(self) -> kv_pb2.StatResponse:
        with self.store() as (channel, signed):
            stub = kv_pb2_grpc.KvStoreStub(channel)
            return stub.Stat(kv_pb2.StatRequest(), timeout=5, metadata=signed)

    @contextlib.contextmanager
    def store(self) -> Iterator[tuple[grpc.Channel, list[tuple[str, str]]]]:
        """A channel to the store node and the metadata that its calls need."""
        token = self.peers.token()
        signed = [] if token is None else [(TOKEN_KEY, token)]
        if not self.peers.secure:
            with grpc.insecure_channel(self.store_address) as channel:
                yield channel, signed
            return
        ca, key, cert = (
            Path(str(name)).read_bytes()
            for name in (self.peers.ca, self.peers.key, self.peers.cert)
        )
        options = [("grpc.ssl_target_name_override", PEER_NAME)]
        credentials = grpc.ssl_channel_credentials(ca, key, cert)
        with grpc.secure_channel(self.store_address, credentials, options=options) as channel:
            yield channel, signed

    def workers(self) -> list[kv_pb2.Worker]:
        with self.store() as (channel, signed):
            stub = kv_pb2_grpc.DirectoryStub(channel)
            answer = stub.List(kv_pb2.ListRequest(), timeout=5, metadata=signed)
            return list(answer.workers)

    def counter(self, role: str, name: str) -> float:
        """Sum of a counter over the live workers of a role, as the directory shows it."""
        wanted = {"prefill": kv_pb2.WORKER_ROLE_PREFILL, "decode": kv_pb2.WORKER_ROLE_DECODE}[role]
        return sum(w.metrics.get(name, 0.0) for w in self.workers() if w.role == wanted)


@dataclass(frozen=True)
class Completion:
    text: str
    token_ids: tuple[int, ...]
    digests: tuple[str, ...]
    finish_reason: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    raw: dict[str, Any]

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    def same_bits(self, other: Completion) -> bool:
        return (self.token_ids, self.digests) == (other.token_ids, other.digests)


def _completion(answer: dict[str, Any]) -> Completion:
    choice, usage = answer["choices"][0], answer["usage"]
    message = choice.get("message") or {}
    return Completion(
        text=choice.get("text", message.get("content") or ""),
        token_ids=tuple(choice.get("token_ids") or ()),
        digests=tuple(choice.get("logits_digests") or ()),
        finish_reason=choice["finish_reason"],
        prompt_tokens=usage["prompt_tokens"],
        cached_tokens=usage["prompt_tokens_details"]["cached_tokens"],
        completion_tokens=usage["completion_tokens"],
        raw=answer,
    )


@contextlib.contextmanager
def cluster(
    model: str, *, launcher: str = "local", trust: str | None = None, **settings: Any
) -> Iterator[Cluster]:
    """A ready cluster on a free port. `settings` are dotted names with `__` for the dot; `trust`
    is the authority of an HTTPS front.
    """
    flags = {name.replace("__", ".", 1): value for name, value in settings.items()}
    flags |= {"model.model": model, "launcher.kind": launcher}
    flags.setdefault("front.port", free_port())
    config = resolve(flags, env={}).config
    owner = launcher_for(config)
    try:
        endpoint = owner.start()
        verify = ssl.create_default_context(cafile=trust) if trust is not None else True
        with httpx.Client(base_url=endpoint.url, timeout=TIMEOUT_S, verify=verify) as client:
            store = endpoint.store_address
            yield Cluster(config, endpoint.url, store, owner, client, endpoint.peers)
    finally:
        owner.stop()
