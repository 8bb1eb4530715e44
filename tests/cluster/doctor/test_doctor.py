"""`penstock doctor` on machines that lack something: it says what, and what to do about it."""

from __future__ import annotations

import json
import os
import shutil
import socket
import stat
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from cluster.cli import main
from cluster.cli.doctor import findings
from cluster.config import ClusterConfig, resolve
from cluster.doctor import machine, packages, services
from cluster.doctor.finding import Finding
from cluster.launchers.common import free_port
from tests.kvstore.redis_server import running_redis

FLAGS = ("--launcher", "local", "--port", "0")


def config(**flags: Any) -> ClusterConfig:
    named = {name.replace("__", "."): value for name, value in flags.items()}
    return resolve({"model.model": "fake", "launcher.kind": "local", **named}, env={}).config


def check(finding: Finding, state: str, *words: str) -> None:
    print(finding.line)
    assert finding.state == state
    for word in words:
        assert word in finding.line
    # One line, and a wrong thing always names its remedy.
    assert "\n" not in finding.line and (state == "ok") == (finding.fix == "")


def test_json_has_every_finding_and_the_exit_code_says_whether_all_is_well(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["doctor", "fake", *FLAGS, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] is True
    checks = {row["check"] for row in told["findings"]}
    assert {"python", "device", "compiler", "memory", "shared_memory", "disk"} <= checks
    assert {"open_files", "packages", "clash", "model", "port", "ray"} <= checks
    assert all(set(row) == {"check", "state", "what", "fix"} for row in told["findings"])
    assert main(["doctor", "no/such/model", *FLAGS, "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    wrong = [row for row in told["findings"] if row["state"] == "fail"]
    assert told["ok"] is False and [row["check"] for row in wrong] == ["model"]
    assert "no/such/model" in wrong[0]["what"] and wrong[0]["fix"]


def test_wrong_usage_is_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--prot", "1"]) == 2
    assert main(["doctor", "--port", "99999"]) == 2
    assert "front.port" in capsys.readouterr().err


def test_a_check_that_breaks_does_not_hide_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Iterator[Finding]:
        raise OSError("no /proc\nhere")
        yield

    monkeypatch.setattr(packages, "packages", broken)
    found = list(findings(config(front__port=0)))
    check(next(each for each in found if each.check == "packages"), "note", "no /proc here")
    assert {"python", "port", "model"} <= {each.check for each in found}


def tool(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.mark.parametrize(
    ("script", "torch", "wanted", "state", "words"),
    [
        ("echo 'NVIDIA H100, 590.11, 81559 MiB'", "2.13.0+cu130", "auto", "ok", ["H100"]),
        ("echo 'NVIDIA H100, 535.1, 81559 MiB'", "2.13.0+cu130", "auto", "fail", ["535.1", "580"]),
        ("echo 'NVIDIA H100, 535.1, 81559 MiB'", "2.13.0+cu128", "cuda", "ok", []),
        ("echo 'NVIDIA H100, 470.2, 81559 MiB'", "2.13.0+cu128", "cuda", "fail", ["525"]),
        ("echo 'NVIDIA H100, 590.11, 81559 MiB'", "2.13.0+cpu", "auto", "note", ["no CUDA"]),
        ("echo 'NVIDIA H100, 590.11, 81559 MiB'", "2.13.0+cpu", "cuda", "fail", ["pip install"]),
        ("echo failed >&2; exit 9", "2.13.0+cu130", "cuda", "fail", ["nvidia-smi", "--gpus all"]),
        ("exit 0", "2.13.0+cu130", "cuda", "fail", ["--device cpu"]),
    ],
)
def test_device_driver_and_torch_must_fit(
    script: str,
    torch: str,
    wanted: str,
    state: str,
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tool(tmp_path, "nvidia-smi", script)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(machine, "version", lambda name: torch)
    check(machine.device(wanted), state, *words)


def test_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(machine, "_DRIVER", tmp_path / "version")
    check(machine.device("auto"), "ok", "CPU")
    check(machine.device("cuda"), "fail", "driver", "--device cpu")
    (tmp_path / "version").touch()
    check(machine.device("auto"), "note", "no GPU answers")


def test_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(machine.compiler(), "ok" if shutil.which("cc") else "note")
    monkeypatch.setenv("CC", "no-such-cc")
    check(machine.compiler(), "note", "no-such-cc", "install")
    tool(tmp_path, "broken-cc", "echo 'fatal error: math.h: No such file' >&2; exit 1")
    monkeypatch.setenv("CC", str(tmp_path / "broken-cc"))
    check(machine.compiler(), "note", "cannot compile", "math.h")


def test_memory_shared_memory_and_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(machine.memory(config(kvstore__memory_bytes="1MiB")), "ok")
    check(machine.memory(config(kvstore__memory_bytes="900TiB")), "note", "--kv-memory")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=64 << 20))
    ray = config(launcher__kind="ray")
    check(machine.shared_memory(ray, tmp_path), "fail", "64 MiB", "--shm-size", "--launcher local")
    check(machine.shared_memory(config(), tmp_path), "ok")
    check(machine.shared_memory(ray, tmp_path / "none"), "fail", "tmpfs")
    check(machine.disk(tmp_path), "fail", "TMPDIR")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1 << 30))
    check(machine.disk(tmp_path), "note", "1.0 GiB", "TMPDIR")


def test_open_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.resource, "getrlimit", lambda which: (1024, 1 << 20))
    check(machine.open_files(config()), "note", "1,024", "ulimit -n 2560")
    check(machine.open_files(config(front__max_streams=64)), "ok")
    monkeypatch.setattr(machine.resource, "getrlimit", lambda which: (1024, 1024))
    check(machine.open_files(config()), "note", "hard limit")


def test_requirements() -> None:
    given = ["numpy>=1", "numpy>=900", "no-such-package-of-anyone>=1; python_version > '3'"]
    given += ["also-not-there; extra == 'test'", "redis[hiredis]<1"]
    found = list(packages.requirements(given))
    lines = [finding.line for finding in found]
    print("\n".join(lines))
    assert [finding.state for finding in found] == ["fail", "fail", "fail", "ok"]
    assert "pip install 'numpy>=900'" in lines[0] and "no-such-package-of-anyone" in lines[1]
    assert "pip install 'redis[hiredis]<1'" in lines[2] and "1 required" in lines[3]
    assert "no-such" not in lines[3]
    (nothing,) = packages.requirements([])
    check(nothing, "fail", "pip install -e")


def test_another_distribution_of_our_names_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyPI's `kernels`, as pip would leave it, found by the real metadata."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").touch()
    about = tmp_path / "kernels-0.11.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.11.0\n")
    (about / "top_level.txt").write_text("kernels\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = list(packages.clashes(packages_distributions()))
    check(found[0], "fail", "`kernels`", "pip uninstall kernels", "--force-reinstall")


def test_a_folder_that_hides_a_package_of_ours_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "training.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "training", raising=False)
    found = list(packages.clashes({}))
    check(found[0], "fail", "training", str(tmp_path), "PYTHONPATH")


def test_a_busy_port_names_who_holds_it() -> None:
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        number = busy.getsockname()[1]
        check(
            services.port("127.0.0.1", number, "--port"),
            "fail", str(number), "--port", f"process {os.getpid()} (",
        )  # fmt: skip
    check(services.port("127.0.0.1", number, "--port"), "ok")
    check(services.port("192.0.2.1", 1234, "--port"), "fail", "--host")
    check(services.port("no.such.host.invalid", 1234, "--port"), "fail", "--host")


def test_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    (found,) = services.ray(config())
    check(found, "ok", "--launcher local")
    (found,) = services.ray(config(launcher__kind="ray"))
    check(found, "ok", "Ray 2.")
    address = f"127.0.0.1:{free_port()}"
    (found,) = services.ray(config(launcher__kind="ray", launcher__ray_address=address))
    check(found, "fail", address, "ray start --head")
    monkeypatch.setenv("TMPDIR", "/tmp/" + "x" * 80)
    (found,) = services.ray(config(launcher__kind="ray"))
    check(found, "fail", "TMPDIR=/tmp")


def test_redis() -> None:
    url = f"redis://user:hush-hush@127.0.0.1:{free_port()}/0"
    gone = services.redis("redis", url, "--redis-url")
    check(gone, "fail", "does not answer", "--redis-url")
    assert "hush" not in gone.line
    check(services.redis("redis", "htp://x", "--redis-url"), "fail", "--redis-url")
    with running_redis() as server:
        check(services.redis("redis", server.url, "--redis-url"), "ok", "answers")
        forgetful = services.redis("journal", server.url, "--journal-url", durable=True)
        check(forgetful, "fail", "forget", "--appendonly yes")


def test_certificates_and_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cluster.tls.files import make

    make(tmp_path / "certs", ("localhost",), days=3, authority_days=400)
    place = tmp_path / "certs"
    tls = {"tls__ca": "ca.crt", "tls__cert": "cluster.crt", "tls__key": "cluster.key"}
    given = {name: str(place / file) for name, file in tls.items()}
    lines = list(services.certificates(config(**given)))
    check(lines[0], "note", "expires in 2 days", "penstock certs renew")
    check(lines[1], "ok", "ca.crt")
    (place / "cluster.key").unlink()
    (gone,) = services.certificates(config(**given))
    check(gone, "fail", "cluster.key", "penstock certs new")
    check(services.keys(tmp_path / "none.yaml"), "fail", "none.yaml", "penstock keys new")


def test_a_model_folder_with_a_shard_that_was_cut_short(tmp_path: Path) -> None:
    from cluster.doctor.model import model

    folder = tmp_path / "model"
    shutil.copytree(Path(str(files("penstock").joinpath("shipped", "ledger"))), folder)
    assert {finding.state for finding in model(str(folder))} == {"ok"}
    os.truncate(folder / "model.safetensors", 1_000_000)
    check(next(iter(model(str(folder)))), "fail", "model.safetensors", "again")
    (folder / "config.json").write_text("{")
    check(next(iter(model(str(folder)))), "fail", "config.json")
