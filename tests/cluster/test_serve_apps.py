"""The Serve applications that KubeRay deploys: settings in, deployments out, secrets nowhere."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ray import cloudpickle

from cluster import serve_apps
from cluster.config import ClusterConfig, resolve
from cluster.drain import running
from cluster.launchers.common import free_port
from kvstore.config import StoreConfig
from kvstore.server import start_server
from penstock.errors import StoreUnavailableError, UsageError

STORE = {"launcher": {"store_address": "store:7070", "pool_resources": True}}
BUILDERS = (serve_apps.prefill, serve_apps.decode, serve_apps.front)


def deployment_of(app: Any) -> Any:
    return app._bound_deployment


def test_a_pool_is_placed_whole_on_its_own_nodes() -> None:
    settings = {
        **STORE,
        "prefill": {"replicas": 3},
        "parallel": {"tensor": 2, "prefill_context": 2},
        "model": {"model": "fake", "device": "cuda"},
    }
    prefill = deployment_of(serve_apps.prefill(settings))
    assert prefill.num_replicas == 3
    group = prefill._replica_config.placement_group_bundles
    assert group == [{"CPU": 1, "GPU": 1, "penstock_prefill": 1}] * 4
    decode = deployment_of(serve_apps.decode(settings))
    assert (
        decode._replica_config.placement_group_bundles
        == [{"CPU": 1, "GPU": 1, "penstock_decode": 1}] * 2
    )


def test_a_front_asks_for_its_own_node_and_no_gpu() -> None:
    front = deployment_of(serve_apps.front({**STORE, "front": {"replicas": 2}}))
    assert front.num_replicas == 2
    assert front.ray_actor_options["resources"] == {"penstock_front": 1}
    assert not front.ray_actor_options.get("num_gpus")


def test_the_environment_of_the_pod_outranks_the_settings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PENSTOCK_PREFILL__REPLICAS", "5")
    app = serve_apps.prefill({**STORE, "prefill": {"replicas": 3}})
    assert deployment_of(app).num_replicas == 5


@pytest.mark.parametrize("build", BUILDERS)
def test_no_secret_is_in_what_serve_keeps(
    build: Callable[[dict[str, Any]], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    secrets = {
        "PENSTOCK_FRONT__API_KEY": "sk-secret-of-clients",
        "PENSTOCK_FRONT__CLUSTER_KEY": "secret-of-the-namespaces",
        "PENSTOCK_KVSTORE__REDIS_URL": "redis://:secret-of-redis@r:6379/0",
    }
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    app = build(STORE)
    kept = cloudpickle.dumps(deployment_of(app).init_args)
    kept += cloudpickle.dumps(deployment_of(app).ray_actor_options)
    print(f"{len(kept)} bytes kept")
    assert b"store:7070" in kept
    assert b"secret" not in kept


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"prefil": {}}, "did you mean 'prefill'"),
        ({"prefill": {"chunk": 1}}, "unknown setting 'prefill.chunk'"),
        ({"decode": {"replicas": 0}}, "decode.replicas"),
        ({"front": "loud"}, "must hold settings"),
    ],
)
def test_wrong_settings_are_one_sentence(
    build: Callable[[dict[str, Any]], Any], settings: dict[str, Any], says: str
) -> None:
    with pytest.raises(UsageError, match=says):
        build({**STORE, **settings})


def test_a_replica_without_a_store_says_what_is_missing() -> None:
    with pytest.raises(UsageError, match=r"store_address is not set.*HOST:PORT"):
        serve_apps._spec_json(ClusterConfig(), "prefill")


def test_the_ready_file_names_a_living_replica_and_only_its_own(tmp_path: Path) -> None:
    path = tmp_path / "run/ready"
    file = serve_apps._ReadyFile(str(path), "node")
    assert running(path) == "node"
    assert path.read_text() == f"{os.getpid()} node\n"
    file.remove()
    assert running(path) is None
    file = serve_apps._ReadyFile(str(path), "node")
    path.write_text("4194304 node\n")  # above the largest process id
    assert running(path) is None
    file.remove()
    assert path.exists(), "a successor's file is not ours to remove"


async def test_a_worker_waits_for_a_store_that_comes_later() -> None:
    port = free_port()
    settings = {"launcher": {"store_address": f"127.0.0.1:{port}", "start_timeout_s": 20}}
    waiting = asyncio.create_task(serve_apps.store_answers(resolve(settings=settings).config))
    await asyncio.sleep(0.7)
    assert not waiting.done()
    server = await start_server(StoreConfig(listen=f"127.0.0.1:{port}"))
    try:
        await asyncio.wait_for(waiting, 10)
    finally:
        await server.stop()


async def test_a_store_that_never_comes_is_named() -> None:
    port = free_port()
    settings = {"launcher": {"store_address": f"127.0.0.1:{port}", "start_timeout_s": 0.2}}
    with pytest.raises(StoreUnavailableError, match=f"127.0.0.1:{port}"):
        await serve_apps.store_answers(resolve(settings=settings).config)
