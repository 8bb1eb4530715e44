"""`penstock doctor`: what may keep a cluster from starting here, each with its fix."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

import typer

from cluster.cli.options import ConfigFile
from penstock.errors import PenstockError

if TYPE_CHECKING:
    from cluster.config import ClusterConfig

_REQUIRED = ("torch", "ray", "grpc", "redis", "tokenizers", "safetensors", "numpy")


@dataclass(frozen=True)
class Finding:
    """`fix` is empty where nothing is wrong. Only a `fatal` one makes the exit code 1."""

    what: str
    fix: str = ""
    fatal: bool = True


def register(app: typer.Typer) -> None:
    app.command("doctor", help="Check this machine; every finding names its fix.")(doctor)


def doctor(config: ConfigFile = None) -> int:
    from cluster.config import resolve

    resolved = resolve(file=config).config
    failed = False
    for finding in _findings(resolved):
        mark = "ok  " if not finding.fix else "FAIL" if finding.fatal else "note"
        fix = f"; {finding.fix}" if finding.fix else ""
        typer.echo(f"{mark} {finding.what}{fix}")
        failed = failed or (bool(finding.fix) and finding.fatal)
    return 1 if failed else 0


def _findings(config: ClusterConfig) -> Iterator[Finding]:
    yield _python()
    yield from _packages()
    yield _clash()
    yield _device(config.model.device)
    yield _memory(config)
    yield _port(config.front.host, config.front.port)
    yield from _model(config.model.model)
    if config.kvstore.redis_url is not None:
        yield _redis(config.kvstore.redis_url)


def _python() -> Finding:
    number = ".".join(map(str, sys.version_info[:3]))
    return Finding(f"python {number}, {os.cpu_count()} cores")


def _packages() -> Iterator[Finding]:
    for name in _REQUIRED:
        # Looked for, not imported: torch alone would take seconds.
        if importlib.util.find_spec(name) is None:
            yield Finding(f"package {name} is missing", "run `pip install penstock`")


def _clash() -> Finding:
    try:
        found = version("kernels")
    except PackageNotFoundError:
        return Finding("no package clashes")
    return Finding(
        f"the PyPI distribution `kernels` {found} hides Penstock's package of that name",
        "run `pip uninstall kernels` and then `pip install --force-reinstall --no-deps penstock`",
    )


def _device(wanted: str) -> Finding:
    tool = shutil.which("nvidia-smi")
    command = [tool or "nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    names = ""
    if tool is not None:
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
            names = done.stdout.strip() if done.returncode == 0 else ""
        except (OSError, subprocess.TimeoutExpired):
            names = ""
    if names:
        return Finding("GPU: " + "; ".join(names.splitlines()))
    if wanted == "cuda":
        return Finding("no GPU answers to nvidia-smi", "install its driver or use --device cpu")
    return Finding("no GPU; models run on the CPU")


def _memory(config: ClusterConfig) -> Finding:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    wanted = config.kvstore.memory_bytes
    wanted += config.prefill.replicas * config.prefill.kv_memory_bytes
    wanted += config.decode.replicas * config.decode.kv_memory_bytes
    what = f"caches of {wanted / 2**30:.1f} GiB in {total / 2**30:.1f} GiB of memory"
    if wanted > 0.9 * total:
        return Finding(what, "lower --kv-memory or --decode-kv-memory", fatal=False)
    return Finding(what)


def _port(host: str, port: int) -> Finding:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            reason = f"cannot listen on {host}:{port} ({error.strerror})"
            return Finding(reason, "stop what holds it or choose another with --port")
    return Finding(f"port {port} of {host} is free")


def _model(model: str) -> Iterator[Finding]:
    from penstock.chat import encoding_of
    from penstock.tokenizer import open_tokenizer

    try:
        tokenizer = open_tokenizer(model)
        if tokenizer is None:
            yield Finding(
                f"the model '{model}' has no tokenizer.json", "add it; only `logits` works without"
            )
            return
        yield Finding(f"model '{model}' with a vocabulary of {tokenizer.vocab_size}")
        if encoding_of(model, tokenizer) == "deepseek_v4":
            yield from _encoding(model)
    except PenstockError as error:
        yield Finding(error.message, "name a model folder, `ledger` or `fake`")


def _encoding(model: str) -> Iterator[Finding]:
    """What the folder's `encoding/` gives, and whether its examples are what we write."""
    from penstock.chat.goldens import replay
    from penstock.chat.prompts import SOURCE, read_prompts
    from penstock.folder import model_folder

    folder = model_folder(model)
    prompts = read_prompts(folder)
    yield Finding(f"chat encoding of DeepSeek-V4, {prompts.generation} generation")
    if prompts.tools is None or not prompts.efforts:
        yield Finding(
            f"{SOURCE} of the model does not give all texts: tools or some reasoning efforts will "
            "be refused",
            "put the release's encoding folder beside config.json",
            fatal=False,
        )
    for golden in replay(folder, prompts) if folder is not None else ():
        if golden.fault:
            yield Finding(golden.fault, "serve a release whose encoding is known")
        else:
            yield Finding(f"{golden.name} encodes as the release does ({golden.mode})")


def _redis(url: str) -> Finding:
    import redis

    try:
        with redis.Redis.from_url(url, socket_timeout=3, socket_connect_timeout=3) as client:
            client.ping()
    except (redis.RedisError, ValueError) as error:
        reason = " ".join(str(error).split())
        return Finding(f"Redis does not answer: {reason}", "start it or leave out --redis-url")
    return Finding("Redis answers")
