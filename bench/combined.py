"""One process that prefills and decodes on one engine, of the real worker classes: what separate
pools are compared with. `python -m bench.combined` is such a worker.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cluster.config import ClusterConfig
from cluster.contracts import Endpoint
from cluster.launchers.common import (
    front_spec,
    http_url,
    require_free_ports,
    start_store,
    wait_until_ready,
    with_token,
    worker_spec,
)
from decode.worker import DecodeWorker
from kvstore.client import StoreClient
from kvstore.directory_client import DirectoryClient
from model.engine import Engine
from model.open import open_engine
from penstock.child import ChildProcess
from penstock.errors import UnavailableError
from penstock.process import Open, main
from penstock.tokenizer import open_tokenizer
from penstock.worker import WorkerSpec
from prefill.worker import PrefillWorker

_CALLS = frozenset(
    {"open", "grow", "release", "load_block", "load_state", "forward", "seek", "draft", "logits"}
    | {"export_block", "export_state", "evidence"}
)


class OneAtATime:
    """An engine that two workers drive: a call waits until the other's has ended, as on one GPU."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._lock = engine, threading.Lock()

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._engine, name)
        if name not in _CALLS:
            return value

        def call(*args: Any, **kwargs: Any) -> Any:
            with self._lock:
                return value(*args, **kwargs)

        return call


class CombinedWorker:
    """Both services in one process; fulfils `penstock.process.Worker`."""

    def __init__(self, prefill: PrefillWorker, decode: DecodeWorker) -> None:
        self._workers = prefill, decode

    async def start(self) -> str:
        addresses = [await worker.start() for worker in self._workers]
        return addresses[0]

    def check(self) -> None:
        for worker in self._workers:
            worker.check()

    async def drain(self, timeout_s: float) -> bool:
        return all([await worker.drain(timeout_s) for worker in self._workers])

    async def stop(self) -> None:
        for worker in self._workers:
            await worker.stop()


async def open_worker(spec: WorkerSpec) -> CombinedWorker:
    """`spec` is the decode worker's; prefill has the same limits."""
    engine: Any = OneAtATime(open_engine(spec.model, spec.ranks))
    tokenizer = open_tokenizer(spec.model.model)

    def store() -> StoreClient:
        info = engine.info
        return StoreClient(
            spec.store_address, fingerprint=info.fingerprint, layout=info.layout, peers=spec.peers
        )

    def directory() -> DirectoryClient:
        return DirectoryClient(spec.store_address, peers=spec.peers)

    return CombinedWorker(
        PrefillWorker(
            spec.model_copy(update={"worker_id": f"{spec.worker_id}-prefill"}),
            engine,
            store(),
            directory(),
        ),
        DecodeWorker(
            spec.model_copy(update={"worker_id": f"{spec.worker_id}-decode"}),
            engine,
            store(),
            directory(),
            decode_bytes=None if tokenizer is None else tokenizer.decode_bytes,
        ),
    )


@contextmanager
def started(config: ClusterConfig) -> Iterator[Endpoint]:
    """`cluster.launch.started` with one combined worker instead of two pools."""
    config = with_token(config)
    require_free_ports(config)
    store, address = start_store(config)
    spec = worker_spec(config, role="decode", worker_id="combined-0", store_address=address)
    children = [
        ChildProcess(
            "combined", "bench.combined", ["--spec-stdin"], first_line=spec.model_dump_json()
        ),
        ChildProcess(
            "front",
            "cluster.front",
            first_line=front_spec(config, store_address=address).model_dump_json(),
        ),
    ]
    try:
        for child in children:
            child.spawn()
        for child in children:
            child.await_ready(config.launcher.start_timeout_s)

        def alive() -> None:
            for child in children:
                if not child.running:
                    raise UnavailableError(f"{child.name} has ended with status {child.poll()}")

        url = http_url(config)
        wait_until_ready(url, timeout_s=config.launcher.start_timeout_s, alive=alive)
        yield Endpoint(url, address, config.tls)
    finally:
        for child in reversed(children):
            child.stop()
        if store is not None:
            store.stop()


def load() -> Open:
    return open_worker


if __name__ == "__main__":
    raise SystemExit(main("bench.combined", load))
