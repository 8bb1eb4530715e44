"""What kube-linter and the restricted pod security standard ask of every object, and that nothing
names what is not there.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator

import pytest
import yaml

from tests.helm import chart
from tests.helm.chart import Doc

pytestmark = pytest.mark.parametrize("values", chart.VALUES_FILES)
# Not served after, so never probed.
_ONCE = ("/model", "/ask")
_SECRET_NAME = re.compile(r"(key|token|password|secret)$", re.IGNORECASE)


def test_resources_are_set(values: str) -> None:
    for name, container in chart.containers(chart.render(values)):
        resources = container["resources"]
        assert {"cpu", "memory"} <= set(resources["requests"]), name
        assert "memory" in resources["limits"], name


def test_probes_are_set_and_sized_to_the_start(values: str) -> None:
    docs = chart.render(values)
    loaded = yaml.safe_load((chart.CHART / values).read_text())
    defaults = yaml.safe_load((chart.CHART / "values.yaml").read_text())
    for name, container in chart.containers(docs):
        if name.endswith(_ONCE):
            continue
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            assert probe in container, f"{name}: {probe}"
            assert {"httpGet", "tcpSocket", "exec"} & set(container[probe]), name
    for role in ("head", "prefill", "decode", "front"):
        wanted = (loaded.get(role) or {}).get("startupSeconds", defaults[role]["startupSeconds"])
        (container,) = chart.group(docs, role)["template"]["spec"]["containers"]
        probe = container["startupProbe"]
        assert wanted <= probe["periodSeconds"] * probe["failureThreshold"] < wanted + 5


def test_images_have_a_version(values: str) -> None:
    for name, container in chart.containers(chart.render(values)):
        image, at, digest = container["image"].partition("@")
        _, _, tag = image.rpartition("/")[2].partition(":")
        assert (at and digest) or (tag and tag != "latest"), f"{name}: {container['image']}"


def test_pods_are_restricted(values: str) -> None:
    for name, pod in chart.pods(chart.render(values)):
        spec = pod["spec"]
        assert spec["automountServiceAccountToken"] is False, name
        assert spec["serviceAccountName"] not in ("", "default"), name
        assert spec["enableServiceLinks"] is False, name
        assert spec["securityContext"]["runAsNonRoot"] is True, name
        assert spec["securityContext"]["runAsUser"] > 0, name
        assert spec["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault", name
        assert not {"hostNetwork", "hostPID", "hostIPC", "hostUsers"} & set(spec), name
        kinds = {kind for v in spec.get("volumes", []) for kind in v if kind != "name"}
        allowed = {"configMap", "secret", "projected", "emptyDir", "persistentVolumeClaim"}
        assert kinds <= allowed, f"{name}: {kinds - allowed}"


def test_containers_are_restricted(values: str) -> None:
    for name, container in chart.containers(chart.render(values)):
        context = container["securityContext"]
        assert context["privileged"] is False, name
        assert context["allowPrivilegeEscalation"] is False, name
        assert context["readOnlyRootFilesystem"] is True, name
        assert context["runAsNonRoot"] is True, name
        assert context["capabilities"] == {"drop": ["ALL"]}, name
        assert not any("hostPort" in port for port in container.get("ports", [])), name


def test_no_role_is_asked_of_the_api_server(values: str) -> None:
    kinds = {doc["kind"] for doc in chart.render(values)}
    assert not {"Role", "ClusterRole", "RoleBinding", "ClusterRoleBinding"} & kinds
    account = chart.one(chart.render(values), "ServiceAccount")
    assert account["automountServiceAccountToken"] is False


def secret_values(docs: tuple[Doc, ...]) -> Iterator[tuple[str, str]]:
    for doc in docs:
        if doc["kind"] == "Secret":
            for key, value in (doc.get("stringData") or {}).items():
                yield f"{doc['metadata']['name']}/{key}", value
            for key, value in (doc.get("data") or {}).items():
                if not key.endswith(".crt"):
                    yield f"{doc['metadata']['name']}/{key}", base64.b64decode(value).decode()


def test_secrets_are_nowhere_but_in_secrets(values: str) -> None:
    docs = chart.render(values)
    found = list(secret_values(docs))
    assert found
    for doc in docs:
        if doc["kind"] == "Secret":
            continue
        text = json.dumps(doc)
        for name, value in found:
            encoded = base64.b64encode(value.encode()).decode()
            assert value not in text, f"{name} is in {doc['kind']}/{doc['metadata']['name']}"
            assert encoded not in text, name


def test_environment_variables_with_secrets_come_from_secrets(values: str) -> None:
    checked = 0
    for name, container in chart.containers(chart.render(values)):
        for variable in container.get("env", []):
            plain = str(variable.get("value", ""))
            assert not re.search(r"://[^/]*:[^/]*@", plain), f"{name}: {variable['name']}"
            if _SECRET_NAME.search(variable["name"]):
                assert "secretKeyRef" in variable["valueFrom"], f"{name}: {variable['name']}"
                checked += 1
    assert checked


def test_every_mount_has_its_volume_and_every_volume_a_use(values: str) -> None:
    for name, pod in chart.pods(chart.render(values)):
        spec = pod["spec"]
        volumes = [v["name"] for v in spec.get("volumes", [])]
        volumes += chart.claimed(chart.render(values), name)
        used = {
            mount["name"]
            for container in (*spec.get("initContainers", []), *spec["containers"])
            for mount in container.get("volumeMounts", [])
        }
        assert len(volumes) == len(set(volumes)), name
        assert used == set(volumes), name


def test_every_reference_leads_to_an_object_or_to_a_named_value(values: str) -> None:
    docs = chart.render(values)
    made = {(doc["kind"], doc["metadata"]["name"]) for doc in docs}
    made |= {("Secret", d["spec"]["secretName"]) for d in docs if d["kind"] == "Certificate"}
    given = (chart.CHART / values).read_text()
    for kind, name in references(docs):
        assert (kind, name) in made or f" {name}\n" in given, f"{kind}/{name}"


def references(docs: tuple[Doc, ...]) -> Iterator[tuple[str, str]]:
    for _, pod in chart.pods(docs):
        spec = pod["spec"]
        yield "ServiceAccount", spec["serviceAccountName"]
        for volume in spec.get("volumes", []):
            sources = [volume, *volume.get("projected", {}).get("sources", [])]
            for source in sources:
                if "configMap" in source:
                    yield "ConfigMap", source["configMap"]["name"]
                if "secret" in source:
                    secret = source["secret"]
                    yield "Secret", secret.get("secretName") or secret["name"]
                if "persistentVolumeClaim" in source:
                    yield "PersistentVolumeClaim", source["persistentVolumeClaim"]["claimName"]
    for _, container in chart.containers(docs):
        for variable in container.get("env", []):
            source = variable.get("valueFrom", {})
            if "secretKeyRef" in source:
                yield "Secret", source["secretKeyRef"]["name"]


def test_keys_that_pods_read_are_in_the_secrets_that_are_made(values: str) -> None:
    docs = chart.render(values)
    keys = {
        doc["metadata"]["name"]: {*(doc.get("stringData") or {}), *(doc.get("data") or {})}
        for doc in docs
        if doc["kind"] == "Secret"
    }
    for name, container in chart.containers(docs):
        for variable in container.get("env", []):
            ref = variable.get("valueFrom", {}).get("secretKeyRef")
            if ref and ref["name"] in keys:
                assert ref["key"] in keys[ref["name"]], f"{name}: {variable['name']}"
    for name, pod in chart.pods(docs):
        for volume in pod["spec"].get("volumes", []):
            for source in volume.get("projected", {}).get("sources", []):
                secret = source["secret"]
                if secret["name"] in keys:
                    items = {item["key"] for item in secret["items"]}
                    assert items <= keys[secret["name"]], name
    auth = chart.one(docs, "RayService")["spec"]["rayClusterConfig"]["authOptions"]
    assert keys[auth["secretName"]] == {"auth_token"}


def matches(selector: Doc, labels: Doc) -> bool:
    """A label selector, as Kubernetes reads it."""
    if any(labels.get(k) != v for k, v in (selector.get("matchLabels") or {}).items()):
        return False
    for rule in selector.get("matchExpressions") or []:
        assert rule["operator"] == "In"
        if labels.get(rule["key"]) not in rule["values"]:
            return False
    return True


def pod_labels(docs: tuple[Doc, ...]) -> dict[str, Doc]:
    """By component."""
    return {
        pod["metadata"]["labels"]["app.kubernetes.io/component"]: pod["metadata"]["labels"]
        for _, pod in chart.pods(docs)
    }


def test_services_and_budgets_select_exactly_their_pods(values: str) -> None:
    docs = chart.render(values)
    labels = pod_labels(docs)
    for doc in docs:
        if doc["kind"] == "Service":
            selector = {"matchLabels": doc["spec"]["selector"]}
        elif doc["kind"] in ("PodDisruptionBudget", "PodMonitor", "ServiceMonitor"):
            selector = doc["spec"]["selector"]
        else:
            continue
        hit = {component for component, each in labels.items() if matches(selector, each)}
        if doc["kind"] == "PodMonitor":
            assert hit == {"head", "prefill", "decode", "front"}
        elif doc["kind"] == "ServiceMonitor":
            assert hit == {"front"}
        else:
            assert hit == {doc["metadata"]["name"].rpartition("-")[2]}, doc["metadata"]["name"]


def test_services_lead_to_ports_that_are_open(values: str) -> None:
    docs = chart.render(values)
    open_ports = {
        pod["metadata"]["labels"]["app.kubernetes.io/component"]: {
            port["containerPort"]
            for container in pod["spec"]["containers"]
            for port in container.get("ports", [])
        }
        for _, pod in chart.pods(docs)
    }
    for doc in docs:
        if doc["kind"] == "Service":
            component = doc["spec"]["selector"]["app.kubernetes.io/component"]
            targets = {port["targetPort"] for port in doc["spec"]["ports"]}
            assert targets <= open_ports[component]


def test_budgets_leave_room_for_one_eviction(values: str) -> None:
    docs = chart.render(values)
    for doc in docs:
        if doc["kind"] == "PodDisruptionBudget":
            role = doc["metadata"]["labels"]["app.kubernetes.io/component"]
            if role == "kvstore":
                replicas = chart.one(docs, "StatefulSet")["spec"]["replicas"]
            else:
                replicas = chart.group(docs, role).get("replicas", 1)
            assert doc["spec"]["minAvailable"] == replicas - 1


def test_pods_outlive_their_drain(values: str) -> None:
    docs = chart.render(values)
    for role in ("head", "prefill", "decode", "front"):
        spec = chart.group(docs, role)["template"]["spec"]
        command = spec["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
        assert command[:3] == ["python", "-m", "cluster.drain"]
        assert command[-2] == "--timeout"
        assert spec["terminationGracePeriodSeconds"] >= int(command[-1]) + 30


def test_shared_memory_holds_rays_object_store(values: str) -> None:
    units = {"Mi": 1 << 20, "Gi": 1 << 30}
    for role in ("head", "prefill", "decode", "front"):
        group = chart.group(chart.render(values), role)
        (shm,) = (v for v in group["template"]["spec"]["volumes"] if v["name"] == "shared-mem")
        size = shm["emptyDir"]["sizeLimit"]
        assert shm["emptyDir"]["medium"] == "Memory"
        held = int(group["rayStartParams"]["object-store-memory"])
        assert held < int(size[:-2]) * units[size[-2:]]


# (from, to, port) that the product needs.
_NEEDED = [
    *[(a, b, 23456) for a in ("head", "prefill", "decode", "front") for b in ("head", "decode")],
    *[
        (role, "kvstore", port)
        for role in ("head", "prefill", "decode", "front")
        for port in (7070, 7071)
    ],
    ("test", "front", 8000),
    ("outside", "front", 8000),
    ("operator", "head", 8265),
]
_REDIS = [("kvstore", "redis", 6379), ("decode", "redis", 6379)]
_REFUSED = [
    ("outside", "head", 8265),
    ("outside", "head", 6379),
    ("outside", "prefill", 8000),
    ("outside", "kvstore", 7070),
    ("outside", "kvstore", 7071),
    ("outside", "front", 6379),
    ("operator", "kvstore", 7070),
    ("test", "kvstore", 7070),
    ("test", "head", 8265),
    ("kvstore", "front", 8000),
    ("front", "kvstore", 6379),
    ("redis", "kvstore", 7070),
    ("redis", "kvstore", 7071),
]


def test_the_network_allows_what_is_needed_and_nothing_else(values: str) -> None:
    docs = chart.render(values)
    world = pod_labels(docs)
    policies = [doc for doc in docs if doc["kind"] == "NetworkPolicy"]
    has_redis = "redis" in world
    limited = any(
        "from" in rule
        for p in policies
        if p["metadata"]["name"].endswith("-front")
        for rule in p["spec"]["ingress"]
        if rule["ports"][0]["port"] == 8000
    )
    for source, target, port in [*_NEEDED, *(_REDIS if has_redis else [])]:
        if source == "outside" and limited:
            continue
        assert allowed(policies, world, source, target, port), (source, target, port)
    refused = [*_REFUSED, *([("outside", "redis", 6379), ("test", "redis", 6379)] * has_redis)]
    for source, target, port in refused:
        if {source, target} <= {*world, "outside", "operator"}:
            assert not allowed(policies, world, source, target, port), (source, target, port)


def allowed(
    policies: list[Doc], world: dict[str, Doc], source: str, target: str, port: int
) -> bool:
    """Whether a connection passes, as Kubernetes defines policies: a pod that some policy of a
    direction selects is open to what one of them allows.
    """
    namespaces = {"operator": "kuberay-system", "outside": "elsewhere"}

    def side(direction: str, mine: str, other: str) -> bool:
        labels = world.get(mine)
        if labels is None:
            return True
        selecting = [
            p
            for p in policies
            if direction in p["spec"]["policyTypes"] and matches(p["spec"]["podSelector"], labels)
        ]
        if not selecting:
            return True
        peers = {"Ingress": ("ingress", "from"), "Egress": ("egress", "to")}[direction]
        return any(
            port_fits(rule)
            and (peers[1] not in rule or any(fits(p, other) for p in rule[peers[1]]))
            for p in selecting
            for rule in p["spec"].get(peers[0]) or []
        )

    def port_fits(rule: Doc) -> bool:
        return "ports" not in rule or any(p["port"] == port for p in rule["ports"])

    def fits(peer: Doc, other: str) -> bool:
        if "podSelector" in peer:
            return other in world and matches(peer["podSelector"], world[other])
        if "namespaceSelector" in peer:
            name = {"kubernetes.io/metadata.name": namespaces.get(other, "space")}
            return matches(peer["namespaceSelector"], name)
        return False

    return side("Egress", source, target) and side("Ingress", target, source)
