"""Every values file lints, renders and is what Kubernetes and KubeRay accept."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from cluster.chart.__main__ import generated
from cluster.chart.readme import rows_of
from tests.helm import chart

ROLES = ("head", "prefill", "decode", "front", "kvstore")


@pytest.mark.parametrize("values", chart.VALUES_FILES)
def test_helm_lints_strictly(values: str) -> None:
    done = chart.helm("lint", "--strict", str(chart.CHART), *chart.options(values))
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("version", chart.KUBERNETES)
@pytest.mark.parametrize("values", chart.VALUES_FILES)
def test_kubernetes_accepts_every_object(values: str, version: str) -> None:
    docs = [d for d in chart.render(values) if d["apiVersion"] not in chart.FOREIGN]
    for doc in docs:
        chart.validate(doc, version)
    print(f"{values} on {version}: {len(docs)} objects")
    assert len(docs) >= 10


@pytest.mark.parametrize("values", chart.VALUES_FILES)
def test_the_pods_of_ray_are_pods_that_kubernetes_accepts(values: str) -> None:
    for name, template in chart.pods(chart.render(values)):
        pod = {"apiVersion": "v1", "kind": "Pod", **template}
        pod["metadata"] = {"name": "x", **template.get("metadata", {})}
        for version in chart.KUBERNETES:
            chart.validate(pod, version)
        print(name)


@pytest.mark.parametrize("values", chart.VALUES_FILES)
def test_kuberay_accepts_the_ray_service(values: str) -> None:
    schema = chart.kuberay_schema()
    service = chart.one(chart.render(values), "RayService")
    errors = list(jsonschema.Draft202012Validator(schema).iter_errors(service))
    for error in errors:
        print(".".join(map(str, error.path)), error.message[:300])
    assert errors == []


def test_the_strict_schemas_refuse_what_is_wrong() -> None:
    docs = chart.render()
    broken = json.loads(json.dumps(chart.one(docs, "StatefulSet")))
    broken["spec"]["template"]["spec"]["container"] = []
    with pytest.raises(AssertionError, match="container"):
        chart.validate(broken, "1.33")
    service = json.loads(json.dumps(chart.one(docs, "RayService")))
    service["spec"]["rayClusterConfig"]["headGroupSpec"]["rayStartParam"] = {}
    validator = jsonschema.Draft202012Validator(chart.kuberay_schema())
    assert [e.message for e in validator.iter_errors(service)] != []


def test_what_is_generated_is_up_to_date() -> None:
    for name, content in generated(chart.CHART).items():
        assert (chart.CHART / name).read_text() == content, f"{name}: run `make helm`"


def test_values_are_few_and_all_explained() -> None:
    text = (chart.CHART / "values.yaml").read_text()
    assert len(text.splitlines()) <= 310
    unexplained = [row.name for row in rows_of(text) if len(row.comment) < 5]
    assert unexplained == []


def test_roles_have_the_same_keys_in_the_same_order() -> None:
    values = yaml.safe_load((chart.CHART / "values.yaml").read_text())
    common = list(values["head"])
    for role in ROLES:
        assert list(values[role])[: len(common)] == common, role
        rest = list(values[role])[len(common) :]
        assert rest == [] if role == "head" else rest[0] == "config", role


def test_names_of_a_long_release_fit_what_kuberay_adds() -> None:
    done = chart.helm("template", "r" * 53, str(chart.CHART))
    assert done.returncode == 0, done.stderr
    names = [d["metadata"]["name"] for d in chart.parse(done.stdout)]
    print(max(names, key=len))
    assert max(len(name) for name in names) <= 63
    service = next(n for n in names if n.startswith("r") and len(n) <= 40)
    assert len(service) <= 40


def test_the_chart_is_whole_without_dashboards_and_rules(tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "penstock"
    shutil.copytree(chart.CHART, copy, ignore=shutil.ignore_patterns("*.json", "rules"))
    shutil.copy(chart.CHART / "values.schema.json", copy)
    on = "monitoring.{}=true"
    flags = [f for key in ("dashboards", "prometheusRule") for f in ("--set", on.format(key))]
    done = chart.helm("template", "x", str(copy), *flags)
    assert done.returncode == 0, done.stderr
    kinds = [d["kind"] for d in chart.parse(done.stdout)]
    assert "PrometheusRule" not in kinds


def test_dashboards_and_rules_reach_grafana_and_prometheus() -> None:
    docs = chart.render(
        "values.yaml", ("monitoring.dashboards=true", "monitoring.prometheusRule=true")
    )
    config_map = chart.one(docs, "ConfigMap", "-dashboards")
    files = {p.name: p.read_text() for p in (chart.CHART / "dashboards").glob("*.json")}
    assert len(files) >= 3
    # As they are: a legend such as {{worker}} is Grafana's, no template of helm's.
    assert {k: json.loads(v) for k, v in config_map["data"].items()} == {
        k: json.loads(v) for k, v in files.items()
    }
    assert any("{{" in text for text in files.values())
    # Most that the API server takes of one object.
    assert len(json.dumps(config_map)) < 1 << 20
    for version in chart.KUBERNETES:
        chart.validate(config_map, version)
    groups = [
        group
        for path in sorted((chart.CHART / "rules").glob("*.yaml"))
        for group in yaml.safe_load(path.read_text())["groups"]
    ]
    assert len(groups) >= 3
    assert chart.one(docs, "PrometheusRule")["spec"]["groups"] == groups
