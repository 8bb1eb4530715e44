"""The joined configuration: precedence, origins, sizes, errors that say what was meant."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.config import ClusterConfig, resolve, schema
from penstock.errors import UsageError
from penstock.settings import format_size, parse_size


def test_flag_beats_environment_beats_file_beats_default(tmp_path: Path) -> None:
    file = tmp_path / "p.yaml"
    file.write_text("front:\n  port: 1001\n  host: 127.0.0.2\ndecode:\n  replicas: 3\n")
    env = {"PENSTOCK_FRONT__PORT": "1002", "PENSTOCK_PREFILL__REPLICAS": "2", "OTHER": "x"}
    cases = [
        ({}, {}, None, 8000, "default"),
        ({}, {}, file, 1001, f"file {file}"),
        ({}, env, file, 1002, "env PENSTOCK_FRONT__PORT"),
        ({"front.port": 1003}, env, file, 1003, "command line"),
        ({"front.port": None}, env, file, 1002, "env PENSTOCK_FRONT__PORT"),
    ]
    for flags, environment, path, port, origin in cases:
        resolved = resolve(flags, env=environment, file=path)
        assert resolved.config.front.port == port
        assert {s.name: s.origin for s in resolved.settings()}["front.port"] == origin
    assert resolved.config.decode.replicas == 3
    assert resolved.config.prefill.replicas == 2


def test_the_configuration_travels_as_json() -> None:
    config = resolve({"front.api_key": "k", "kvstore.memory_bytes": "4GiB"}, env={}).config
    assert ClusterConfig.model_validate_json(config.model_dump_json()) == config
    assert config.kvstore.memory_bytes == 4 << 30
    assert config.front.keys == ("k",)


def test_secrets_are_not_shown() -> None:
    resolved = resolve({"front.api_key": "hush-hush"}, env={})
    assert "hush-hush" not in str([s.shown for s in resolved.settings()])
    assert "hush-hush" not in repr(resolved.config)


@pytest.mark.parametrize(
    ("flags", "env", "words"),
    [
        ({"front.prot": 1}, {}, ["front.prot", "did you mean 'port'"]),
        ({}, {"PENSTOCK_FRONT__PORTT": "1"}, ["PENSTOCK_FRONT__PORTT", "did you mean 'port'"]),
        ({}, {"PENSTOCK_FRNT__PORT": "1"}, ["frnt", "did you mean 'front'"]),
        ({}, {"PENSTOCK_FRONT__PORT": "x"}, ["front.port", "PENSTOCK_FRONT__PORT", "'x'"]),
        ({"kvstore.memory_bytes": "4 parsecs"}, {}, ["4 parsecs", "4GiB"]),
        ({"model.device": "gpu"}, {}, ["model.device", "'cpu'", "gpu"]),
        ({"parallel.tensor": 0}, {}, ["parallel.tensor", "1"]),
        ({"front.tls_cert": "a"}, {}, ["tls_cert", "tls_key"]),
        ({"front.api_key": ","}, {}, ["no key"]),
    ],
)
def test_faults_are_one_sentence(
    flags: dict[str, Any], env: dict[str, str], words: list[str]
) -> None:
    with pytest.raises(UsageError) as caught:
        resolve(flags, env=env)
    assert "\n" not in caught.value.message
    for word in words:
        assert word in caught.value.message


@pytest.mark.parametrize(
    ("content", "word"),
    [("front: [", "YAML"), ("- a", "sections"), ("front: 3", "front"), ("frnt: {}", "'front'")],
)
def test_broken_files_are_named(tmp_path: Path, content: str, word: str) -> None:
    file = tmp_path / "p.yaml"
    file.write_text(content)
    with pytest.raises(UsageError, match=word):
        resolve(file=file, env={})
    with pytest.raises(UsageError, match="cannot read"):
        resolve(file=tmp_path / "none.yaml", env={})


@pytest.mark.parametrize(
    ("front", "allowed"),
    [
        ({"host": "127.0.0.1"}, True),
        ({"host": "localhost"}, True),
        ({"host": "::1"}, True),
        ({"host": "0.0.0.0"}, False),
        ({"host": "node.example"}, False),
        ({"host": "0.0.0.0", "api_key": "k"}, False),
        ({"host": "0.0.0.0", "tls_cert": "c", "tls_key": "k"}, False),
        ({"host": "0.0.0.0", "api_key": "k", "tls_cert": "c", "tls_key": "k"}, True),
        ({"host": "0.0.0.0", "insecure": True}, True),
    ],
)
def test_other_addresses_need_key_and_tls(front: dict[str, Any], allowed: bool) -> None:
    flags = {f"front.{k}": v for k, v in front.items()}
    if allowed:
        resolve(flags, env={})
    else:
        with pytest.raises(UsageError, match="--insecure"):
            resolve(flags, env={})


@given(st.integers(0, 1 << 60))
def test_sizes_come_back(size: int) -> None:
    assert parse_size(format_size(size)) == size


def test_sizes_as_people_write_them() -> None:
    cases = {"4GiB": 4 << 30, "512 MiB": 512 << 20, "1.5GB": 1_500_000_000, "7": 7, "1kib": 1024}
    for text, size in cases.items():
        assert parse_size(text) == size


def test_the_schema_names_every_section() -> None:
    assert set(schema()["properties"]) == set(ClusterConfig.model_fields)


def test_the_configuration_loads_nothing_heavy() -> None:
    code = (
        "import sys, cluster.config; "
        "print([m for m in ('torch', 'ray', 'grpc', 'fastapi', 'tokenizers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
