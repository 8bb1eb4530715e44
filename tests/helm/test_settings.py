"""What the chart tells the product is what the product understands."""

from __future__ import annotations

import base64
import json
import ssl
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography import x509
from ray.serve.schema import ServeDeploySchema

from cluster import serve_apps
from cluster.config import resolve
from penstock.peers import PEER_NAME, Peers
from tests.helm import chart

ROLES = ("prefill", "decode", "front")


@pytest.mark.parametrize("values", chart.VALUES_FILES)
def test_serve_understands_its_configuration(values: str) -> None:
    told = ServeDeploySchema.model_validate(chart.serve_config(chart.render(values)))
    assert [app.name for app in told.applications] == list(ROLES)
    assert [app.route_prefix for app in told.applications] == [None, None, "/"]
    assert told.http_options.port == 8000


@pytest.mark.parametrize("values", chart.VALUES_FILES)
def test_the_product_builds_every_application(values: str, monkeypatch: pytest.MonkeyPatch) -> None:
    docs = chart.render(values)
    # As on a pod: the worker listens where others can reach it.
    monkeypatch.setenv("PENSTOCK_LAUNCHER__WORKER_HOST", "10.1.2.3")
    for app in chart.serve_config(docs)["applications"]:
        module, _, name = app["import_path"].partition(":")
        assert module == serve_apps.__name__
        built = getattr(serve_apps, name)(app["args"])._bound_deployment
        group = chart.group(docs, app["name"])
        print(app["name"], built.num_replicas, built.ray_actor_options)
        assert built.num_replicas == group["replicas"], "a pod a replica"
        assert_fits(built, group)


def assert_fits(built: Any, group: dict[str, Any]) -> None:
    """A pod of the group offers exactly what one replica asks for, ranks and all."""
    bundles = built._replica_config.placement_group_bundles or [
        {
            "CPU": built.ray_actor_options["num_cpus"],
            "GPU": built.ray_actor_options.get("num_gpus") or 0,
            **built.ray_actor_options["resources"],
        }
    ]
    asked: dict[str, float] = {}
    for bundle in bundles:
        for name, amount in bundle.items():
            asked[name] = asked.get(name, 0) + amount
    params = group["rayStartParams"]
    own = yaml.safe_load(params["resources"].strip("'"))
    offered = {"CPU": int(params["num-cpus"]), "GPU": int(params.get("num-gpus", 0)), **own}
    assert {k: v for k, v in asked.items() if v} == {k: v for k, v in offered.items() if v}


@pytest.mark.parametrize("values", chart.VALUES_FILES)
def test_the_store_understands_its_configuration(values: str, tmp_path: Path) -> None:
    docs = chart.render(values)
    file = tmp_path / "config.yaml"
    file.write_text(chart.one(docs, "ConfigMap", "-kvstore")["data"]["config.yaml"])
    config = resolve(file=file, env={}).config
    assert config.tls.secure
    assert config.tls.has_token
    store = config.kvstore
    port = chart.one(docs, "Service", "-kvstore")["spec"]["ports"][0]["port"]
    assert store.listen == f"0.0.0.0:{port}"
    limit = next(c for n, c in chart.containers(docs) if n.endswith("/kvstore"))
    assert store.memory_bytes < size_bytes(limit["resources"]["limits"]["memory"])


@pytest.mark.parametrize("values", chart.VALUES_FILES)
def test_workers_and_fronts_call_the_store_where_it_is(values: str) -> None:
    docs = chart.render(values)
    service = chart.one(docs, "Service", "-kvstore")
    store = chart.one(docs, "StatefulSet", "-kvstore")
    assert store["spec"]["serviceName"] == service["metadata"]["name"]
    name = store["metadata"]["name"]
    for app in chart.serve_config(docs)["applications"]:
        called = app["args"]["launcher"]["store_address"]
        assert called == f"{name}-0.{service['metadata']['name']}.space.svc:7070"


def size_bytes(quantity: str) -> int:
    units = {"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "Ti": 1 << 40}
    return int(quantity[:-2]) * units[quantity[-2:]]


def test_the_self_made_pair_is_one_that_the_product_takes(tmp_path: Path) -> None:
    secret = chart.one(chart.render(), "Secret", "-tls")
    for name, value in secret["data"].items():
        (tmp_path / name).write_bytes(base64.b64decode(value))
    token = chart.one(chart.render(), "Secret", "-generated")["data"]["cluster-token"]
    (tmp_path / "cluster-token").write_bytes(base64.b64decode(token))
    told = chart.serve_config(chart.render())["applications"][0]["args"]["tls"]
    here = {k: v.replace("/etc/penstock/tls", str(tmp_path)) for k, v in told.items()}
    peers = Peers(**here)
    peers.check()
    der = ssl.PEM_cert_to_DER_cert((tmp_path / "tls.crt").read_text())
    names = x509.load_der_x509_certificate(der).extensions.get_extension_for_class(
        x509.SubjectAlternativeName
    )
    assert names.value.get_values_for_type(x509.DNSName) == [PEER_NAME]


@pytest.mark.parametrize("tls", ["", "front-pair"])
def test_the_batch_service_is_called_through_the_fronts_service(tls: str) -> None:
    sets = ("front.service.grpcPort=9100", f"front.tls.existingSecret={json.dumps(tls)}")
    docs = chart.render("values.yaml", sets)
    ports = {p["name"]: p for p in chart.one(docs, "Service", "-front")["spec"]["ports"]}
    assert (ports["grpc"]["port"], ports["grpc"]["targetPort"]) == (9100, 9000)
    (container,) = chart.group(docs, "front")["template"]["spec"]["containers"]
    assert {"name": "grpc", "containerPort": 9000} in container["ports"]
    args = chart.serve_config(docs)["applications"][2]["args"]
    # As on a pod, where it listens at the pod's address.
    env = {"PENSTOCK_FRONT__HOST": "10.1.2.3", "PENSTOCK_FRONT__API_KEY": "sk-x"}
    assert {v["name"] for v in container["env"]} >= set(env)
    config = resolve(settings=args, env=env).config
    assert config.batch.grpc_port == 9000
    assert (config.front.tls_cert is not None) == bool(tls)
    policy = chart.one(docs, "NetworkPolicy", "-front")["spec"]["ingress"][0]
    assert [port["port"] for port in policy["ports"]] == [8000, 9000]
    for version in chart.KUBERNETES:
        for doc in docs:
            if doc["apiVersion"] not in chart.FOREIGN:
                chart.validate(doc, version)


def test_a_change_of_any_setting_starts_the_store_anew() -> None:
    """It reads its file once."""

    def checksum(*sets: str) -> str:
        store = chart.one(chart.render("values.yaml", sets), "StatefulSet", "-kvstore")
        return str(store["spec"]["template"]["metadata"]["annotations"]["checksum/config"])

    sets = ('telemetry.log_level="debug"', "kvstore.config.max_leases=9", 'kvstore.disk.size="9Gi"')
    assert len({checksum(), *map(checksum, sets)}) == 1 + len(sets)


@pytest.mark.parametrize(
    ("endpoint", "port"),
    [("http://otel.observability:4318", 4318), ("https://traces.example.com/otlp", 443)],
)
def test_spans_may_leave_where_an_endpoint_is_named(endpoint: str, port: int) -> None:
    docs = chart.render("values.yaml", (f"telemetry.otlp_endpoint={json.dumps(endpoint)}",))
    wanted = {"ports": [{"port": port, "protocol": "TCP"}]}
    for name in ("-ray", "-kvstore"):
        assert wanted in chart.one(docs, "NetworkPolicy", name)["spec"]["egress"]
        plain = chart.one(chart.render(), "NetworkPolicy", name)["spec"]["egress"]
        assert wanted not in plain
    for doc in docs:
        if doc["kind"] == "NetworkPolicy":
            for version in chart.KUBERNETES:
                chart.validate(doc, version)


def test_every_pod_may_pull_from_a_private_registry() -> None:
    docs = chart.render("values.yaml", ('image.pullSecrets=["registry"]',))
    for name, pod in chart.pods(docs):
        assert pod["spec"]["imagePullSecrets"] == [{"name": "registry"}], name


def test_a_gateway_waits_as_long_as_the_longest_answer() -> None:
    docs = chart.render("values.yaml", ('httpRoute={"enabled":true,"parentRefs":[{"name":"g"}]}',))
    (rule,) = chart.one(docs, "HTTPRoute")["spec"]["rules"]
    assert rule["timeouts"] == {"request": "3600s"}


def test_the_account_may_carry_a_clouds_identity_and_still_no_token() -> None:
    docs = chart.render("values.yaml", ('serviceAccountAnnotations={"cloud/role":"reader"}',))
    account = chart.one(docs, "ServiceAccount")
    assert account["metadata"]["annotations"] == {"cloud/role": "reader"}
    assert account["automountServiceAccountToken"] is False
    for version in chart.KUBERNETES:
        chart.validate(account, version)


def test_a_pool_that_scales_has_room_for_its_pods_and_a_policy_without_secrets() -> None:
    scaling = "prefill.config.autoscaling"
    sets = (f"{scaling}.enabled=true", f"{scaling}.max_replicas=6", f"{scaling}.min_replicas=2")
    docs = chart.render(sets=sets)
    cluster = chart.one(docs, "RayService")["spec"]["rayClusterConfig"]
    assert cluster["enableInTreeAutoscaling"] is True
    sizes = {
        name: [chart.group(docs, name)[key] for key in ("minReplicas", "replicas", "maxReplicas")]
        for name in ROLES
    }
    assert sizes == {"prefill": [2, 2, 6], "decode": [1, 1, 1], "front": [1, 1, 1]}
    plain = chart.one(chart.render(), "RayService")["spec"]["rayClusterConfig"]
    assert "enableInTreeAutoscaling" not in plain
    prefill = chart.serve_config(docs)["applications"][0]
    app = serve_apps.prefill(prefill["args"])
    scaled = app._bound_deployment._deployment_config.autoscaling_config
    assert (scaled.min_replicas, scaled.max_replicas) == (2, 6)
    told = scaled.policy.policy_kwargs
    assert told["role"] == "prefill" and told["store_address"].endswith(":7070")
    assert told["peers"]["cluster_token"] is None and told["peers"]["cluster_token_file"]
