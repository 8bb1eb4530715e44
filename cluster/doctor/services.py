"""What a cluster talks to: ports, Redis, Ray, the journal; its certificates and keys."""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import os
import socket
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from cluster.config import ClusterConfig
from cluster.doctor.finding import Finding
from penstock.errors import PenstockError

_TIMEOUT_S = 3.0
_RAY_PORT = 6379
_LONGEST_SOCKET_PATH = 107
"""Of a Unix socket; Ray puts some 60 characters below its temporary folder."""


def services(config: ClusterConfig) -> Iterator[Finding]:
    yield port(config.front.host, config.front.port, "--port")
    if config.batch.grpc_port is not None:
        yield port(config.front.host, config.batch.grpc_port, "--grpc-port")
    yield from ray(config)
    if config.kvstore.redis_url is not None:
        yield redis("redis", config.kvstore.redis_url, "--redis-url")
    journal = config.batch.journal_url
    if journal is not None and not journal.startswith("sqlite:"):
        yield redis("journal", journal, "--journal-url", durable=True)
    yield from certificates(config)
    if config.front.api_keys_file is not None:
        yield keys(Path(config.front.api_keys_file))


def port(host: str, number: int, flag: str) -> Finding:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, number))
        except OSError as error:
            reason = f"cannot listen on {host}:{number} ({error.strerror})"
            if error.errno == errno.EADDRINUSE:
                holder = holder_of(number)
                reason += f": {holder} holds it" if holder else ""
                fix = f"stop what holds it or choose another with {flag}"
            elif error.errno in (errno.EACCES, errno.EPERM):
                fix = f"ports below 1024 need a privilege; choose another with {flag}"
            else:
                fix = "name an address of this machine with --host"
            return Finding("port", reason, fix)
        except (socket.gaierror, UnicodeError, OverflowError) as error:
            return Finding("port", f"'{host}' is no host: {error}", "name another with --host")
    return Finding("port", f"port {number} of {host} is free")


def holder_of(number: int, proc: Path = Path("/proc")) -> str:
    """`process 123 (name)` that listens on the port; '' if that cannot be seen."""
    inodes = set()
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in (proc / "net" / table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == number:
                    inodes.add(f"socket:[{fields[9]}]")
    for link in proc.glob("[0-9]*/fd/*") if inodes else ():
        with contextlib.suppress(OSError):
            if os.readlink(link) in inodes:  # noqa: PTH115
                name = (link.parent.parent / "comm").read_text().strip()
                return f"process {link.parent.parent.name} ({name})"
    return ""


def ray(config: ClusterConfig) -> Iterator[Finding]:
    if config.launcher.kind != "ray":
        yield Finding("ray", "Ray is not used (--launcher local)")
        return
    if importlib.util.find_spec("ray") is None:
        yield Finding("ray", "Ray is missing", "`pip install 'ray[serve]'`, or --launcher local")
        return
    address = config.launcher.ray_address
    if address is None:
        try:
            number = version("ray")
        except PackageNotFoundError:
            number = "of unknown version"
        yield _own_ray(number)
        return
    yield _joined_ray(address)


def _own_ray(number: str) -> Finding:
    temporary = os.environ.get("TMPDIR", "/tmp")
    if len(temporary) > _LONGEST_SOCKET_PATH - 70:
        return Finding(
            "ray",
            f"TMPDIR is {len(temporary)} characters long: Ray's socket paths below it do not fit",
            "set TMPDIR=/tmp, or --launcher local",
        )
    return Finding("ray", f"Ray {number}, started and stopped with the cluster")


def _joined_ray(address: str) -> Finding:
    plain = address.rpartition("://")[2]
    host, _, text = plain.partition(":")
    if address == "auto" or not host:
        return Finding("ray", f"Ray at '{address}' is looked for when the cluster starts")
    number = int(text) if text.isdigit() else _RAY_PORT
    try:
        socket.create_connection((host, number), timeout=_TIMEOUT_S).close()
    except OSError as error:
        return Finding(
            "ray",
            f"no Ray answers at {host}:{number} ({error.strerror or error})",
            "start it there with `ray start --head`, correct launcher.ray_address, or leave it out",
        )
    return Finding("ray", f"something answers at Ray's address {host}:{number}")


def redis(check: str, url: str, flag: str, *, durable: bool = False) -> Finding:
    """`durable`: it must keep what it was told when it is killed."""
    import redis as client

    try:
        with client.Redis.from_url(
            url, socket_timeout=_TIMEOUT_S, socket_connect_timeout=_TIMEOUT_S
        ) as connection:
            info: Any = connection.info()
    except (client.RedisError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:200].rstrip(".")
        start = "start it (`redis-server --appendonly yes`)" if durable else "start it"
        return Finding(check, f"Redis does not answer: {reason}", f"{start} or leave out {flag}")
    what = f"Redis {info.get('redis_version', '')} answers"
    if durable and not info.get("aof_enabled"):
        return Finding(
            check,
            f"{what}, but would forget the journal when it restarts",
            f"run it with `--appendonly yes`, or leave out {flag} for a file",
        )
    return Finding(check, what)


def certificates(config: ClusterConfig) -> Iterator[Finding]:
    """Those that are configured: readable, of one pair, and not about to end."""
    from cluster.tls.files import warning
    from penstock.peers import check_pair

    pairs = []
    front, tls = config.front, config.tls
    try:
        if front.tls_cert is not None and front.tls_key is not None:
            check_pair(front.tls_cert, front.tls_key, "front.tls_cert", "front.tls_key")
            pairs.append(front.tls_cert)
        tls.check()
        pairs += [name for name in (tls.cert, tls.ca) if name is not None]
        for name in pairs:
            said = warning(Path(name))
            if said:
                fix = "run `penstock certs renew` and restart"
                yield Finding("certificates", said, fix, fatal="expired" in said)
            else:
                yield Finding("certificates", f"certificate {name}")
    except PenstockError as error:
        sentence, _, fix = error.message.partition("; ")
        yield Finding("certificates", sentence, fix or "run `penstock certs new`")


def keys(file: Path) -> Finding:
    from cluster.auth.keys import read_keys

    try:
        found = read_keys(file).keys
    except PenstockError as error:
        sentence, _, fix = error.message.partition("; ")
        fix = fix or f"make it with `penstock keys new --file {file}`"
        return Finding("keys", sentence, fix)
    return Finding("keys", f"{len(found)} API keys in {file}")
