"""The cluster as Serve applications that a configuration file names: what KubeRay deploys.

    applications:
      - name: prefill          # these names: the front finds the pools by them
        import_path: cluster.serve_apps:prefill
        args: {model: {...}, parallel: {...}, prefill: {...}, launcher: {store_address: ...}}

`args` are settings as in a file of `--config`. Each replica joins them with the environment of its
own pod, which outranks them: so secrets (`PENSTOCK_FRONT__API_KEY`, ...) are read where they are
needed and are never part of what Serve keeps in Ray's store.
"""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import Any

import ray

from cluster import deployments
from cluster.config import ClusterConfig, resolve
from cluster.front import FrontReplica
from cluster.launchers.common import front_spec, worker_spec
from cluster.policy import DECODE, PREFILL
from cluster.pools import DecodeReplica, PrefillReplica
from kvstore.directory_client import DirectoryClient
from penstock.errors import StoreUnavailableError, UsageError

# Elsewhere a model that fails to load may have met one bad node.
_RETRIES = 20
_POLL_S = 0.5


def prefill(args: dict[str, Any]) -> Any:
    """The prefill pool. Raises `UsageError` for settings that cannot be."""
    config = _joined(args)
    return _pool(PrefillOfService, args, PREFILL, config)


def decode(args: dict[str, Any]) -> Any:
    """The decode pool. Raises `UsageError` for settings that cannot be."""
    config = _joined(args)
    return _pool(DecodeOfService, args, DECODE, config)


def _pool(replica: type, args: dict[str, Any], role: str, config: ClusterConfig) -> Any:
    return deployments.pool(
        replica,
        args,
        role=role,
        config=config,
        retries=_RETRIES,
        store_address=_store_of(config),
        secrets=False,
    )


def front(args: dict[str, Any]) -> Any:
    """The HTTP front. Raises `UsageError` for settings that cannot be."""
    return deployments.front(FrontOfService, args, config=_joined(args))


class PrefillOfService(PrefillReplica):
    """A prefill worker that reads its settings where it runs."""

    async def __init__(self, settings: dict[str, Any]) -> None:  # type: ignore[misc]
        config = _joined(settings)
        await store_answers(config)
        await super().__init__(_spec_json(config, PREFILL))
        self._ready = _ReadyFile(config.launcher.ready_file, _node_id())

    async def __del__(self) -> None:
        await super().__del__()
        self._ready.remove()


class DecodeOfService(DecodeReplica):
    """A decode worker that reads its settings where it runs."""

    async def __init__(self, settings: dict[str, Any]) -> None:  # type: ignore[misc]
        config = _joined(settings)
        await store_answers(config)
        await super().__init__(_spec_json(config, DECODE))
        self._ready = _ReadyFile(config.launcher.ready_file, _node_id())

    async def __del__(self) -> None:
        await super().__del__()
        self._ready.remove()


class FrontOfService(FrontReplica):
    """A front that reads its settings where it runs."""

    async def __init__(self, settings: dict[str, Any]) -> None:  # type: ignore[misc]
        config = _joined(settings)
        spec = front_spec(config, store_address=_store_of(config))
        await super().__init__(spec.model_dump_json())
        self._ready = _ReadyFile(config.launcher.ready_file, _node_id())

    async def __del__(self) -> None:
        await super().__del__()
        self._ready.remove()


class _ReadyFile:
    """Says to the pod's probes and to `cluster.drain` that a replica serves here: it holds the
    replica's process id, and a killed replica's id is no process, and its Ray node.
    """

    def __init__(self, path: str | None, node_id: str) -> None:
        self._path = None if path is None else Path(path)
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            fresh = self._path.with_name(f"{self._path.name}.{os.getpid()}")
            fresh.write_text(f"{os.getpid()} {node_id}\n")
            fresh.replace(self._path)

    def remove(self) -> None:
        if self._path is None or not self._path.exists():
            return
        # A successor on the same node may have written its own already.
        if self._path.read_text().startswith(f"{os.getpid()} "):
            self._path.unlink(missing_ok=True)


def _node_id() -> str:
    return str(ray.get_runtime_context().get_node_id())


async def store_answers(config: ClusterConfig) -> None:
    """Waits for the store node, which may start later than a worker: Serve gives a pool up after
    three failed starts. Raises `StoreUnavailableError` after `launcher.start_timeout_s`.
    """
    directory = DirectoryClient(_store_of(config), peers=config.tls)
    deadline = time.monotonic() + config.launcher.start_timeout_s
    try:
        while True:
            try:
                await directory.list()
                return
            except StoreUnavailableError:
                if time.monotonic() > deadline:
                    raise
            await asyncio.sleep(_POLL_S)
    finally:
        await directory.close()


def _joined(settings: dict[str, Any]) -> ClusterConfig:
    return resolve(settings=settings).config


def _spec_json(config: ClusterConfig, role: str) -> str:
    spec = worker_spec(config, role=role, worker_id=role, store_address=_store_of(config))
    return spec.model_dump_json()


def _store_of(config: ClusterConfig) -> str:
    if config.launcher.store_address is None:
        raise UsageError(
            "launcher.store_address is not set: a cluster that Serve deploys needs a store node "
            "that runs already; give HOST:PORT of one started with `python -m kvstore`"
        )
    return config.launcher.store_address
