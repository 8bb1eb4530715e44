"""No value without an effect, no setting of the product out of reach."""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from enum import StrEnum
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from cluster.chart.owned import OWNED
from cluster.chart.schema import values_schema
from cluster.config import ClusterConfig, resolve
from tests.helm import chart

# Lists and maps whose elements have a shape.
_SHAPED: Mapping[str, str] = {
    "pullSecrets": '["X"]',
    "tolerations": '[{"key": "X"}]',
    "topologySpread": '[{"topologyKey": "X"}]',
    "extraEnv": '[{"name": "X", "value": "v"}]',
    "parentRefs": '[{"name": "X"}]',
    "hostnames": '["X"]',
    "frontFrom": '[{"podSelector": {"matchLabels": {"a": "X"}}}]',
    "egressTo": '[{"to": [{"podSelector": {"matchLabels": {"a": "X"}}}]}]',
}
# Sections that stand in values.yaml as they are, without a `config`.
_PLAIN = ("parallel", "telemetry", "batch", "router")
_CONTEXTS: tuple[dict[str, Any], ...] = (
    {
        "model.device": "cuda",
        "model.source.type": "hub",
        "ingress.enabled": True,
        "httpRoute.enabled": True,
        "monitoring.podMonitor": True,
        "monitoring.serviceMonitor": True,
        "front.auth.keysFileSecret": "",
        "tls.certManager.enabled": False,
        "redis.bundled.enabled": False,
        "redis.external.url": "",
        "ray.gcsFaultTolerance.enabled": True,
        "image.digest": "",
    },
    {
        "model.source.type": "shipped",
        "model.name": "fake",
        "front.auth.existingSecret": "",
        "tls.existingSecret": "",
        "tls.certManager.enabled": True,
        "redis.external.existingSecret": "",
        "redis.external.url": "",
        "redis.bundled.enabled": True,
        "nameOverride": "",
        "fullnameOverride": "",
        "model.servedName": "",
    },
    {
        "model.source.type": "object",
        "model.source.claimName": "",
        "model.servedName": "",
        "front.auth.existingSecret": "",
        "tls.certManager.enabled": False,
        "redis.external.existingSecret": "",
        "redis.bundled.enabled": False,
        "fullnameOverride": "",
    },
)


def leaves(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value and key != "config":
            yield from leaves(value, f"{name}.")
        else:
            yield name, value


def put(values: dict[str, Any], name: str, value: Any) -> None:
    *path, last = name.split(".")
    for part in path:
        values = values.setdefault(part, {})
    values[last] = value


def marked(defaults: Any) -> tuple[dict[str, Any], dict[str, str], list[str]]:
    """Values each of which can be told from all others, what to look for, and what cannot be."""
    values: dict[str, Any] = {}
    marks: dict[str, str] = {}
    others: list[str] = []
    for number, (name, default) in enumerate(leaves(defaults), start=1001):
        mark, key = f"mark{number}", name.rpartition(".")[2]
        value: Any = mark
        if isinstance(default, bool) or key in ("replicas", "maxUnavailable", "type", "device"):
            others.append(name)
            continue
        if key in _SHAPED:
            value = json.loads(_SHAPED[key].replace("X", mark))
        elif isinstance(default, dict):
            value = {mark: mark}
        elif key in ("objectStoreMemory", "maxMemory"):
            value, mark = f"{number}Mi", str(number << 20)
        elif name == "kvstore.disk.size":
            value = mark = f"{number}Gi"
        elif key == "startupSeconds":
            # A period of 5 s; the store's is 2 s.
            period = 2 if name.startswith("kvstore") else 5
            value, mark = number * period, f"failureThreshold: {number}"
        elif isinstance(default, int):
            value, mark = number, str(number)
        put(values, name, value)
        marks[name] = mark
    return values, marks, others


@pytest.fixture(scope="module")
def lenient(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The chart without its schema, so that marks may stand anywhere."""
    copy = tmp_path_factory.mktemp("lenient") / "penstock"
    shutil.copytree(chart.CHART, copy, ignore=shutil.ignore_patterns("values.schema.json"))
    (copy / "rules").mkdir(exist_ok=True)
    (copy / "rules/one.yaml").write_text("groups: [{name: g, rules: []}]")
    (copy / "dashboards").mkdir(exist_ok=True)
    (copy / "dashboards/one.json").write_text("{}")
    return copy


def rendered(folder: Path, values: dict[str, Any], tmp_path: Path) -> str:
    with tempfile.NamedTemporaryFile("w", suffix=".json", dir=tmp_path) as file:
        json.dump(values, file)
        file.flush()
        done = chart.helm("template", "trial", str(folder), "-f", file.name)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_value_is_used(lenient: Path, tmp_path: Path) -> None:
    defaults = yaml.safe_load((chart.CHART / "values.yaml").read_text())
    values, marks, others = marked(defaults)
    texts = []
    for context in _CONTEXTS:
        here = json.loads(json.dumps(values))
        for name, value in context.items():
            put(here, name, value)
        texts.append(rendered(lenient, here, tmp_path))
    unused = [name for name, mark in marks.items() if not any(mark in text for text in texts)]
    print(f"{len(marks)} values marked, {len(others)} turned")
    assert unused == []
    assert unturned(lenient, defaults, others, tmp_path) == []


def unturned(folder: Path, defaults: Any, names: list[str], tmp_path: Path) -> list[str]:
    """Of values that are no text of their own: those whose change changes nothing."""
    plain = dict(leaves(defaults))
    base: dict[str, Any] = {}
    for name, value in _BASE.items():
        put(base, name, value)
    before = steady(rendered(folder, base, tmp_path))

    def changes(name: str) -> bool:
        turned = json.loads(json.dumps(base))
        value = plain[name]
        put(turned, name, not value if isinstance(value, bool) else _TURN.get(value, 3))
        return steady(rendered(folder, turned, tmp_path)) != before

    with ThreadPoolExecutor() as pool:
        return [
            name for name, seen in zip(names, pool.map(changes, names), strict=True) if not seen
        ]


_TURN = {"cpu": "cuda", "ClusterIP": "NodePort", "shipped": "object"}
# So that a turned value alone is a whole wish.
_BASE = {
    "ingress.host": "h",
    "httpRoute.parentRefs": [{"name": "g"}],
    "tls.certManager.issuerRef": {"name": "i"},
    "ray.gcsFaultTolerance.redisAddress": "redis://r:6379",
    "model.source.uri": "s3://b/m",
    "model.source.digest": "sha256:1",
    "model.source.configDigest": "sha256:2",
    **{f"{role}.replicas": 2 for role in ("head", "prefill", "decode", "front", "kvstore")},
}


def steady(text: str) -> list[str]:
    """Without what is drawn anew at each rendering."""
    drawn = (
        "api-key:",
        "cluster-key:",
        "cluster-token:",
        "redis-",
        "auth_token:",
        ".crt:",
        "tls.k",
    )
    return [line for line in text.splitlines() if not line.strip().startswith(drawn)]


def fields() -> Iterator[tuple[str, Any]]:
    for section, of_section in ClusterConfig.model_fields.items():
        for name, field in of_section.annotation.model_fields.items():  # type: ignore[union-attr]
            yield f"{section}.{name}", field


@functools.cache
def reachable() -> frozenset[str]:
    """Settings that stand under some `config` of the schema."""
    found = set()
    definitions = values_schema()["$defs"]
    blocks = {"prefill": "PrefillPool", "decode": "DecodePool", "front": "Front"}
    blocks |= {"kvstore": "KvStore", "model": "Model"}
    for section, block in blocks.items():
        for name in definitions[block]["properties"]["config"]["properties"]:
            found.add(f"{section}.{name}")
    for section in _PLAIN:
        for name in values_schema()["properties"][section]["properties"]:
            found.add(f"{section}.{name}")
    return frozenset(found)


def test_every_setting_is_reachable_or_the_charts_own() -> None:
    every = {name for name, _ in fields()}
    assert every - reachable() - set(OWNED) == set(), "give it a `config` or a reason in owned.py"
    assert set(OWNED) & reachable() == set()
    assert set(OWNED) - every == set(), "the product has no such setting any more"


def test_what_the_chart_owns_names_a_value_that_is_there() -> None:
    there = dict(leaves(yaml.safe_load((chart.CHART / "values.yaml").read_text())))
    for name, owned in OWNED.items():
        assert owned.why, name
        assert not owned.value or owned.value in there, name


def _options_of(annotation: Any) -> list[str]:
    """What an enumeration or a Literal allows, also inside a union."""
    if isinstance(annotation, type) and issubclass(annotation, StrEnum):
        return [each.value for each in annotation]
    found: list[str] = []
    for each in get_args(annotation):
        found += [each] if isinstance(each, str) else _options_of(each)
    return found


def another(name: str, field: Any) -> Any:
    """A value that is allowed and not the default."""
    fixed = {
        "model.rounding": "none",
        "model.num_speculative_tokens": 3,
        "model.draft_confidence": 0.5,
        "model.fake_draft_accuracy": 0.5,
        "model.max_model_len": 4096,
        "batch.sources": ["file:///data/"],
        "prefill.autoscaling": {"enabled": True, "max_replicas": 3},
        "decode.autoscaling": {"enabled": True, "max_replicas": 3},
        "telemetry.otlp_endpoint": "http://collector:4318",
        "telemetry.trace_ratio": 0.5,
    }
    if name in fixed:
        return fixed[name]
    default = field.default
    choices = _options_of(field.annotation)
    if choices:
        return next(c for c in choices if c != default)
    if isinstance(default, bool):
        return not default
    if isinstance(default, int | float):
        return default + 1
    return f"{default or ''}x"


# Section -> the processes that read it.
_READERS: Mapping[str, tuple[str, ...]] = {
    "model": ("prefill", "decode", "front"),
    "parallel": ("prefill", "decode"),
    "prefill": ("prefill",),
    "decode": ("decode",),
    "front": ("front",),
    "batch": ("front",),
    "router": ("front",),
    "kvstore": ("kvstore",),
    "telemetry": ("prefill", "decode", "front", "kvstore"),
}


def test_every_setting_under_a_config_reaches_the_product(tmp_path: Path) -> None:
    wanted = {name: another(name, field) for name, field in fields() if name in reachable()}
    values: dict[str, Any] = {}
    for name, value in wanted.items():
        section, _, setting = name.partition(".")
        put(
            values,
            f"{section}.{setting}" if section in _PLAIN else f"{section}.config.{setting}",
            value,
        )
    file = tmp_path / "values.yaml"
    file.write_text(yaml.safe_dump(values))
    done = chart.helm("template", "trial", str(chart.CHART), "-f", str(file))
    assert done.returncode == 0, done.stderr
    docs = chart.parse(done.stdout)
    told = {app["name"]: app["args"] for app in chart.serve_config(docs)["applications"]}
    config_map = chart.one(docs, "ConfigMap", "-kvstore")["data"]["config.yaml"]
    told["kvstore"] = chart.parse(config_map)[0]
    missing = []
    for process, settings in told.items():
        got = {s.name: s.value for s in resolve(settings=settings, env={}).settings()}
        for name, value in wanted.items():
            if process not in _READERS[name.partition(".")[0]]:
                continue
            parts = {name: value}
            if isinstance(value, dict):
                parts = {f"{name}.{key}": part for key, part in value.items()}
            for part, carried in parts.items():
                mine = list(got[part]) if isinstance(got[part], tuple) else got[part]
                if mine != carried:
                    missing.append((process, part, carried, mine))
    print(f"{len(wanted)} settings carried")
    assert missing == []
