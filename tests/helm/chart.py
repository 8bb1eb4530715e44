"""The chart as the real helm renders it, and the schemas that it is held against."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from referencing import Registry, Resource

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm/penstock"
KUBERNETES = ("1.30", "1.31", "1.32", "1.33")
VALUES_FILES = ("values.yaml", *sorted(p.name for p in CHART.glob("values-*.yaml")))
_HELM = Path(sys.executable).with_name("helm")
_KUBERAY = ROOT.parent / "shared/data/kuberay/rayservices.v1.schema.json"
# Owned by operators that no Kubernetes schema knows.
FOREIGN = frozenset(
    {
        "ray.io/v1",
        "monitoring.coreos.com/v1",
        "gateway.networking.k8s.io/v1",
        "cert-manager.io/v1",
    }
)

Doc = dict[str, Any]
# The C parser, where there is one: ten times as fast on a whole release.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def parse(text: str) -> list[Doc]:
    """Every document that is one."""
    return [doc for doc in yaml.load_all(text, Loader=_LOADER) if doc]


def helm(*args: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """The real helm. Its home is nobody's."""
    return subprocess.run(
        [str(_HELM), *args],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], "HOME": "/nonexistent", **(env or {})},
    )


def options(values: str, sets: Sequence[str] = ()) -> list[str]:
    """Flags of a values file and of `--set-json` assignments."""
    flags = [] if values == "values.yaml" else ["-f", str(CHART / values)]
    for assignment in sets:
        flags += ["--set-json", assignment]
    return flags


@functools.cache
def render(values: str = "values.yaml", sets: tuple[str, ...] = ()) -> tuple[Doc, ...]:
    """What `helm template` of a values file gives: every document. Fails with helm's words."""
    done = helm("template", "trial", str(CHART), "-n", "space", *options(values, sets))
    assert done.returncode == 0, done.stderr
    return tuple(parse(done.stdout))


def refusal(*sets: str) -> str:
    """What helm says to wrong values. Fails if it takes them."""
    done = helm("template", "trial", str(CHART), *options("values.yaml", sets))
    assert done.returncode != 0, f"helm took {sets}"
    return done.stderr


def one(docs: Sequence[Doc], kind: str, suffix: str = "") -> Doc:
    """The only document of the kind whose name ends so."""
    found = [d for d in docs if d["kind"] == kind and d["metadata"]["name"].endswith(suffix)]
    assert len(found) == 1, [d["metadata"]["name"] for d in found]
    return found[0]


def pods(docs: Sequence[Doc]) -> Iterator[tuple[str, Doc]]:
    """Every pod that comes of the release: a name and the pod's template."""
    for doc in docs:
        name = f"{doc['kind']}/{doc['metadata']['name']}"
        match doc["kind"]:
            case "Pod":
                yield name, doc
            case "Deployment" | "StatefulSet" | "DaemonSet" | "Job":
                yield name, doc["spec"]["template"]
            case "RayService":
                cluster = doc["spec"]["rayClusterConfig"]
                yield f"{name}/head", cluster["headGroupSpec"]["template"]
                for group in cluster["workerGroupSpecs"]:
                    yield f"{name}/{group['groupName']}", group["template"]


def containers(docs: Sequence[Doc]) -> Iterator[tuple[str, Doc]]:
    """Every container, also those that only start a pod."""
    for name, pod in pods(docs):
        for container in (*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]):
            yield f"{name}/{container['name']}", container


def claimed(docs: Sequence[Doc], pod: str) -> list[str]:
    """Volumes that a pod of `pods` has by a claim of its own."""
    for doc in docs:
        if f"{doc['kind']}/{doc['metadata']['name']}" == pod:
            return [c["metadata"]["name"] for c in doc["spec"].get("volumeClaimTemplates", [])]
    return []


def group(docs: Sequence[Doc], name: str) -> Doc:
    """One of the Ray groups: head, prefill, decode, front."""
    cluster = one(docs, "RayService")["spec"]["rayClusterConfig"]
    if name == "head":
        return dict(cluster["headGroupSpec"])
    return next(dict(g) for g in cluster["workerGroupSpecs"] if g["groupName"] == name)


def serve_config(docs: Sequence[Doc]) -> Doc:
    return parse(one(docs, "RayService")["spec"]["serveConfigV2"])[0]


def validate(doc: Doc, version: str) -> None:
    """Strictly: a key that Kubernetes does not know is an error. Raises with the path."""
    error = next(iter(_validator(doc["kind"], doc["apiVersion"], version).iter_errors(doc)), None)
    if error is not None:
        place = ".".join(str(part) for part in error.path)
        raise AssertionError(
            f"{doc['kind']}/{doc['metadata']['name']} on {version}: {place}: {error.message[:500]}"
        )


@functools.cache
def _validator(kind: str, api_version: str, version: str) -> Any:
    """As `kubernetes_validate.validate(..., strict=True)` makes one, but once for all objects."""
    folder = f"kubernetes-json-schema/v{version}.0-local-strict"
    domain, slash, number = api_version.rpartition("/")
    name = f"{domain.partition('.')[0]}-{number}" if slash else number
    schema = kubernetes_validate.utils.schema_contents(
        f"{folder}/{kind.lower()}-{name}.json", version
    )
    return jsonschema.Draft202012Validator(schema, registry=_registry(version))


@functools.cache
def _registry(version: str) -> Registry[Any]:
    definitions = kubernetes_validate.utils.schema_contents(
        f"kubernetes-json-schema/v{version}.0-local-strict/_definitions.json", version
    )
    # Crawled once here, else at every reference.
    return (
        Registry().with_resource("_definitions.json", Resource.from_contents(definitions)).crawl()
    )


def kuberay_schema() -> Doc:
    """KubeRay's own schema, made strict. Skips the test where its data is not at hand."""
    if not _KUBERAY.is_file():
        pytest.skip("KubeRay's schema is not beside this checkout (../shared/data/kuberay)")
    return dict(_strict(json.loads(_KUBERAY.read_text())))


def _strict(schema: Any) -> Any:
    """With unknown keys refused, as the API server prunes them without a word."""
    if isinstance(schema, list):
        return [_strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: _strict(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
        made.setdefault("additionalProperties", False)
    return made
