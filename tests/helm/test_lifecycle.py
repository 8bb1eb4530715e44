"""A release's life with the real helm: install, upgrade, rollback, test, uninstall."""

from __future__ import annotations

import base64
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helm import chart
from tests.helm.apiserver import ApiServer, Place, Refused
from tests.helm.chart import Doc
from tests.helm.patches import strategic

CI = ("-f", str(chart.CHART / "values-ci.yaml"))


class Cluster:
    """An API server and helm beside it."""

    def __init__(self, folder: Path) -> None:
        self.api = ApiServer()
        self._config = str(self.api.kubeconfig(folder))

    def helm(self, *args: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        flags = ["--kubeconfig", self._config, "-n", "space"]
        done = chart.helm(*args, *flags)
        assert done.returncode == code, done.stdout + done.stderr
        return done

    def install(self, *flags: str, name: str = "trial") -> str:
        return self.helm("install", name, str(chart.CHART), *CI, *flags).stdout

    def upgrade(self, *flags: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        args = ("upgrade", "trial", str(chart.CHART), *CI, *flags)
        return self.helm(*args, code=code)

    def revisions(self) -> list[str]:
        lines = self.helm("history", "trial").stdout.splitlines()[1:]
        return [next(word for word in _STATES if word in line) for line in lines]

    def assert_is_what_helm_says(self, name: str = "trial") -> None:
        """Every object equals the release's manifest, and there are no others."""
        manifest = chart.parse(self.helm("get", "manifest", name).stdout)
        wanted = {(d["kind"], d["metadata"]["name"]): d for d in manifest}
        found = self.api.of_release()
        mine = {
            key: obj
            for key, obj in found.items()
            if obj["metadata"]["labels"]["app.kubernetes.io/instance"] == name
            and "helm.sh/hook" not in obj["metadata"].get("annotations", {})
        }
        assert set(mine) == set(wanted)
        for key, doc in wanted.items():
            assert comparable(mine[key]) == comparable(doc), key
        print(f"{len(wanted)} objects are as the manifest says")

    def secret(self, suffix: str, key: str) -> str:
        (data,) = (
            obj["data"]
            for (kind, name), obj in self.api.of_release().items()
            if kind == "Secret" and name.startswith("trial") and name.endswith(suffix)
        )
        return base64.b64decode(data[key]).decode()


_STATES = ("deployed", "superseded", "failed", "uninstalled")


def comparable(doc: Doc) -> Any:
    """Without what the server adds, and secrets as it keeps them."""
    data = dict(doc.get("data") or {})
    for key, value in (doc.get("stringData") or {}).items():
        data[key] = base64.b64encode(value.encode()).decode()
    labels = doc["metadata"]["labels"]
    return {"labels": labels, "data": data, "spec": doc.get("spec"), "type": doc.get("type")}


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path)
    yield cluster
    cluster.api.close()


def test_a_whole_life(cluster: Cluster) -> None:
    notes = cluster.install()
    assert "curl -s http://127.0.0.1:8000/v1/chat/completions" in notes.splitlines()[-1]
    cluster.assert_is_what_helm_says()
    secrets = [("-generated", "api-key"), ("-generated", "cluster-key"), ("-ray", "auth_token")]
    secrets += [("-generated", "redis-url"), ("-generated", "cluster-token"), ("-tls", "tls.key")]
    before = {each: cluster.secret(*each) for each in secrets}
    assert before["-generated", "api-key"].startswith("sk-")

    cluster.upgrade(
        "--set",
        "decode.replicas=3,front.config.max_streams=7",
        "--set-json",
        'kvstore.config={"memory_bytes":"64MiB"}',
    )
    cluster.assert_is_what_helm_says()
    service = cluster.api.of_release()["RayService", "trial-penstock"]
    groups = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    assert [g["replicas"] for g in groups] == [1, 3, 1]
    assert "max_streams: 7" in service["spec"]["serveConfigV2"]
    assert {each: cluster.secret(*each) for each in secrets} == before

    cluster.helm("rollback", "trial", "1")
    cluster.assert_is_what_helm_says()
    service = cluster.api.of_release()["RayService", "trial-penstock"]
    assert "max_streams" not in service["spec"]["serveConfigV2"]
    assert {each: cluster.secret(*each) for each in secrets} == before
    assert cluster.revisions() == ["superseded", "superseded", "deployed"]

    cluster.helm("test", "trial")
    cluster.helm("uninstall", "trial")
    left = {key for key in cluster.api.of_release() if key[0] != "Pod"}
    assert left == set()


def test_fronts_with_a_journal_each_are_told_of(cluster: Cluster) -> None:
    told = "Each front keeps batch jobs and files of its own"
    one = "PENSTOCK_BATCH__JOURNAL_URL"
    by_env = f'front.extraEnv=[{{"name":"{one}","valueFrom":{{"secretKeyRef":{{}}}}}}]'
    assert told not in cluster.install()
    assert told in cluster.upgrade("--set", "front.replicas=2").stdout
    for journal in ('batch.journal_url="redis://r:6379/2"', by_env):
        said = cluster.upgrade("--set", "front.replicas=2", "--set-json", journal).stdout
        assert told not in said and "curl -s http" in said.splitlines()[-1]


def test_what_is_switched_off_goes_and_what_is_switched_on_comes(cluster: Cluster) -> None:
    cluster.install()
    assert ("Deployment", "trial-penstock-redis") in cluster.api.of_release()
    on = "redis.bundled.enabled=false,networkPolicy.enabled=false,monitoring.serviceMonitor=true"
    cluster.upgrade("--set", f"{on},ingress.enabled=true,ingress.host=h.example.com")
    cluster.assert_is_what_helm_says()
    kinds = {kind for kind, _ in cluster.api.of_release()}
    assert {"Deployment", "NetworkPolicy"} & kinds == set()
    assert {"ServiceMonitor", "Ingress"} <= kinds
    cluster.upgrade()
    cluster.assert_is_what_helm_says()


def test_a_change_of_settings_alone_touches_no_pod(cluster: Cluster) -> None:
    cluster.install()
    before = cluster.api.of_release()["RayService", "trial-penstock"]["spec"]
    cluster.upgrade("--set", "prefill.config.chunk_tokens=4096,model.config.numerics=fast")
    after = cluster.api.of_release()["RayService", "trial-penstock"]["spec"]
    assert after["rayClusterConfig"] == before["rayClusterConfig"], "new pods, twice the GPUs"
    assert after["serveConfigV2"] != before["serveConfigV2"]


def test_a_wrong_value_changes_nothing(cluster: Cluster) -> None:
    cluster.install()
    before = dict(cluster.api.of_release())
    said = cluster.upgrade("--set", "prefill.replicas=0", code=1).stderr
    assert "prefill.replicas" in said
    assert cluster.api.of_release() == before
    assert cluster.revisions() == ["deployed"]


def test_an_upgrade_that_breaks_half_way_is_mended_by_the_next(cluster: Cluster) -> None:
    cluster.install()
    key = cluster.secret("-generated", "api-key")
    for number, kind in enumerate(("RayService", "StatefulSet", "PodDisruptionBudget"), start=2):
        wish = ("--set", f"decode.replicas={number},kvstore.podLabels.a={kind}")
        cluster.api.fail(kind)
        said = cluster.upgrade(*wish, code=1).stderr
        assert f"the webhook of {kind} does not answer" in said
        cluster.upgrade(*wish)
        cluster.assert_is_what_helm_says()
        assert cluster.secret("-generated", "api-key") == key


def test_an_install_that_breaks_can_be_taken_away_and_done_again(cluster: Cluster) -> None:
    cluster.api.fail("RayService")
    args = ("install", "trial", str(chart.CHART), *CI)
    cluster.helm(*args, code=1)
    cluster.helm("uninstall", "trial")
    assert cluster.api.of_release() == {}
    cluster.install()
    cluster.assert_is_what_helm_says()


def test_helm_test_fails_with_its_pod(cluster: Cluster) -> None:
    cluster.install()
    cluster.api.pod_phase = "Failed"
    assert "Failed" in cluster.helm("test", "trial", code=1).stdout


def test_two_releases_share_a_namespace(cluster: Cluster) -> None:
    cluster.install()
    cluster.install(name="other")
    cluster.assert_is_what_helm_says()
    cluster.assert_is_what_helm_says("other")
    cluster.helm("uninstall", "other")
    cluster.assert_is_what_helm_says()


def test_the_server_is_as_strict_as_kubernetes(cluster: Cluster) -> None:
    """Else the tests above would prove little."""
    cluster.install()
    store = cluster.api.of_release()["StatefulSet", "trial-penstock-kvstore"]
    place = Place("apps/v1", "statefulsets", "space", "trial-penstock-kvstore")
    for reason, edit in (
        ("immutable", lambda old: {**old, "spec": {**old["spec"], "serviceName": "x"}}),
        ("Unevaluated|unexpected", lambda old: {**old, "spec": {**old["spec"], "replica": 2}}),
    ):
        with pytest.raises(Refused, match=reason):
            cluster.api.change(place, edit)
    with pytest.raises(Refused, match="already exists"):
        cluster.api.create(place, store)
    # Nothing is taken over from another release.
    again = ("install", "two", str(chart.CHART), *CI, "--set", "fullnameOverride=trial-penstock")
    assert "invalid ownership metadata" in cluster.helm(*again, code=1).stderr


@given(
    st.lists(st.sampled_from("abcdef"), unique=True, max_size=5),
    st.lists(st.sampled_from("abcdef"), unique=True, max_size=5),
)
def test_strategic_lists_end_as_the_client_meant(old: list[str], new: list[str]) -> None:
    """The patch that a client makes of two lists of containers leads from one to the other."""
    target = {"containers": [{"name": n, "image": "1"} for n in old]}
    wanted = [{"name": n, "image": "2"} for n in new]
    patch = {
        "$setElementOrder/containers": [{"name": n} for n in new],
        "containers": [
            *({"name": n, "image": "2"} for n in new),
            *({"$patch": "delete", "name": n} for n in old if n not in new),
        ],
    }
    assert strategic(target, patch)["containers"] == wanted
