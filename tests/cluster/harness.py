"""A whole cluster for tests, used through its public doors: HTTP, gRPC stat, process ids."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import grpc
import httpx

from cluster.config import ClusterConfig, resolve
from cluster.contracts import Launcher
from cluster.launch import launcher_for
from cluster.launchers.common import free_port
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
        with grpc.insecure_channel(self.store_address) as channel:
            return kv_pb2_grpc.KvStoreStub(channel).Stat(kv_pb2.StatRequest(), timeout=5)

    def workers(self) -> list[kv_pb2.Worker]:
        with grpc.insecure_channel(self.store_address) as channel:
            answer = kv_pb2_grpc.DirectoryStub(channel).List(kv_pb2.ListRequest(), timeout=5)
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
def cluster(model: str, *, launcher: str = "local", **settings: Any) -> Iterator[Cluster]:
    """A ready cluster on a free port. `settings` are dotted names with `__` for the dot."""
    flags = {name.replace("__", ".", 1): value for name, value in settings.items()}
    flags |= {"model.model": model, "launcher.kind": launcher}
    flags.setdefault("front.port", free_port())
    config = resolve(flags, env={}).config
    owner = launcher_for(config)
    try:
        endpoint = owner.start()
        with httpx.Client(base_url=endpoint.url, timeout=TIMEOUT_S) as client:
            yield Cluster(config, endpoint.url, endpoint.store_address, owner, client)
    finally:
        owner.stop()
