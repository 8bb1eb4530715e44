"""The store's disk tier in the chart: a claim, what the store is told of it, and what a change of
it asks of the operator.
"""

from __future__ import annotations

import asyncio
import socket
import time
from pathlib import Path

import pytest
import yaml

from cluster.config import resolve
from kvstore.client import StoreClient
from penstock.peers import Peers
from tests.helm import chart
from tests.helm.apiserver import Place
from tests.helm.chart import Doc
from tests.helm.pods import Machine
from tests.helm.test_lifecycle import Cluster
from tests.helm.test_lifecycle import cluster as cluster  # A fixture.
from tests.kvstore.objects import FINGERPRINT, LAYOUT, blocks_of, chain, fetch, same

ON = ('kvstore.disk={"size":"10Gi","storageClass":"fast","whenDeleted":"Retain"}',)
# One store and nothing beside it.
ALONE = ('kvstore.disk.size="1Gi"', "redis.bundled.enabled=false")


def told(docs: tuple[Doc, ...]) -> Doc:
    """The store's own file."""
    return dict(yaml.safe_load(chart.one(docs, "ConfigMap", "-kvstore")["data"]["config.yaml"]))


def test_without_a_size_there_is_neither_claim_nor_tier() -> None:
    docs = chart.render()
    spec = chart.one(docs, "StatefulSet", "-kvstore")["spec"]
    assert not {"volumeClaimTemplates", "persistentVolumeClaimRetentionPolicy"} & set(spec)
    assert resolve(settings=told(docs), env={}).config.kvstore.disk_bytes == 0


@pytest.mark.parametrize("version", chart.KUBERNETES)
def test_the_claim_is_one_that_kubernetes_accepts(version: str) -> None:
    store = chart.one(chart.render("values.yaml", ON), "StatefulSet", "-kvstore")
    chart.validate(store, version)
    (claim,) = store["spec"]["volumeClaimTemplates"]
    chart.validate({"apiVersion": "v1", "kind": "PersistentVolumeClaim", **claim}, version)
    assert claim["spec"]["resources"] == {"requests": {"storage": "10Gi"}}
    assert claim["spec"]["storageClassName"] == "fast"
    policy = store["spec"]["persistentVolumeClaimRetentionPolicy"]
    assert policy == {"whenDeleted": "Retain", "whenScaled": "Retain"}


def test_the_store_keeps_its_tier_inside_the_claim_and_below_its_size() -> None:
    docs = chart.render("values.yaml", ON)
    pod = chart.one(docs, "StatefulSet", "-kvstore")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    (mount,) = (m for m in container["volumeMounts"] if m["name"] == "disk")
    config = resolve(settings=told(docs), env={}).config.kvstore
    # Not the mount's root, which the kubelet owns: the folder is closed to all but its user.
    assert Path(config.disk_dir).parent == Path(mount["mountPath"])
    assert not mount.get("readOnly")
    assert 0.85 * (10 << 30) < config.disk_bytes <= 0.9 * (10 << 30)
    # A fresh volume is root's; this group may write.
    assert pod["securityContext"]["fsGroup"] == pod["securityContext"]["runAsGroup"]


def test_settings_of_the_tier_stand_beside_its_size() -> None:
    docs = chart.render("values.yaml", (*ON, "kvstore.config.disk_readers=9"))
    config = resolve(settings=told(docs), env={}).config.kvstore
    assert (config.disk_readers, config.memory_bytes) == (9, 1 << 30)


def test_a_running_claim_is_not_changed_until_its_operator_lets_go(cluster: Cluster) -> None:
    cluster.install("--set", "kvstore.disk.size=1024Gi")
    before = dict(cluster.api.of_release())
    place = Place("apps/v1", "statefulsets", "space", "trial-penstock-kvstore")

    def canonical(store: Doc) -> Doc:
        """As Kubernetes writes the same size."""
        (claim,) = store["spec"]["volumeClaimTemplates"]
        assert claim["spec"]["resources"]["requests"]["storage"] == "1024Gi"
        claim["spec"]["resources"]["requests"]["storage"] = "1Ti"
        return store

    cluster.api.objects["StatefulSet", "space", place.name] = canonical(cluster.api.get(place))
    for change in ("size=2Ti", "size=", "storageClass=fast,kvstore.disk.size=1Ti"):
        said = cluster.upgrade("--set", f"kvstore.disk.{change}", code=1).stderr
        assert "delete statefulset trial-penstock-kvstore --cascade=orphan" in said, change
    assert cluster.api.of_release() == before, "nothing was changed before the refusal"
    assert cluster.revisions() == ["deployed"]

    cluster.api.delete(place)
    cluster.upgrade("--set", "kvstore.disk.size=2Ti")
    cluster.assert_is_what_helm_says()
    # The same wish again, and one that touches no claim.
    cluster.upgrade("--set", "kvstore.disk.size=2Ti,kvstore.disk.whenDeleted=Retain")
    cluster.assert_is_what_helm_says()


def test_a_killed_store_pod_has_its_blocks_again(tmp_path: Path) -> None:
    docs = chart.render("values.yaml", ALONE)
    machine = Machine(docs, tmp_path)
    try:
        asyncio.run(_killed_and_back(machine))
    finally:
        machine.close()
    (log,) = (tmp_path / "claims/disk-kvstore-0").rglob("catalog.log")
    # What prompts became is its user's alone.
    assert log.parent.stat().st_mode & 0o777 == 0o700


async def _killed_and_back(machine: Machine) -> None:
    address = f"127.0.0.1:{machine.ports['kvstore']}"
    store = chart.one(machine.docs, "StatefulSet", "-kvstore")["spec"]["template"]

    def start() -> StoreClient:
        machine.start_pod("kvstore-0", store, lambda word: word.replace("0.0.0.0:7070", address))
        deadline = time.monotonic() + 30
        with socket.socket() as probe:
            while probe.connect_ex(("127.0.0.1", machine.ports["kvstore"])) != 0:
                assert time.monotonic() < deadline, machine.logs()
                time.sleep(0.05)
        tls = told(machine.docs)["tls"]
        mounts = machine.mounts("kvstore-0", store)
        peers = Peers(**{name: machine.here(path, mounts) for name, path in tls.items()})
        return StoreClient(address, fingerprint=FINGERPRINT, layout=LAYOUT, peers=peers)

    items = blocks_of(chain(5))
    client = start()
    for item in items:
        assert await client.put(item, owner="writer", lease_ttl_s=60)
    await on_disk(client, len(items))
    await client.close()
    machine.kill("kvstore-0")
    client = start()
    await on_disk(client, len(items))
    found = await fetch(client, [item.id for item in items])
    assert all(same(got, item) for got, item in zip(found, items, strict=True))
    print(f"{len(found)} blocks after a kill: {machine.logs()[-300:]}")
    await client.close()


async def on_disk(client: StoreClient, objects: int) -> None:
    async with asyncio.timeout(20):
        while (await client.stat()).disk_objects < objects:  # noqa: ASYNC110 - another process
            await asyncio.sleep(0.05)
