"""The folder of a cluster's certificates: what `penstock certs` writes and `tls.*` names."""

from __future__ import annotations

import os
import secrets
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cluster.tls.authority import About, Pair, about, new_authority, new_front, new_member
from penstock.errors import UsageError

_AUTHORITY, _MEMBER, _FRONT, _TOKEN = "ca", "cluster", "front", "cluster.token"
RENEW_WITHIN_DAYS = 30


@dataclass(frozen=True)
class Known:
    """One certificate of a folder."""

    file: Path
    about: About

    def days_left(self, now: datetime) -> int:
        return (self.about.until - now).days


def make(folder: Path, hosts: tuple[str, ...], *, days: int, authority_days: int) -> None:
    """A new authority with a member's and a front's certificate and a token.

    Raises `UsageError` if the folder already holds an authority: a second one would cut off
    everything that trusts the first.
    """
    if (folder / f"{_AUTHORITY}.key").exists() or (folder / f"{_AUTHORITY}.crt").exists():
        raise UsageError(
            f"{folder} already holds an authority; `penstock certs renew` makes new certificates "
            "of it, or choose another --dir"
        )
    authority = new_authority(authority_days)
    member, front = new_member(authority, days), new_front(authority, hosts, days)
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise UsageError(f"cannot make {folder}: {error.strerror}") from error
    for name, pair in ((_MEMBER, member), (_FRONT, front), (_AUTHORITY, authority)):
        _keep(folder, name, pair)
    _write(folder / _TOKEN, secrets.token_urlsafe(32).encode() + b"\n", 0o600)


def renew(folder: Path, hosts: tuple[str, ...], *, days: int) -> None:
    """New certificates of the same authority. No `hosts`: those of the front's last one."""
    authority = Pair(
        _read(folder / f"{_AUTHORITY}.crt"),
        _read(folder / f"{_AUTHORITY}.key"),
    )
    if not hosts:
        hosts = about(_read(folder / f"{_FRONT}.crt")).hosts
    member, front = new_member(authority, days), new_front(authority, hosts, days)
    for name, pair in ((_MEMBER, member), (_FRONT, front)):
        _keep(folder, name, pair)


def known(folder: Path) -> list[Known]:
    """Every certificate of the folder. Raises `UsageError` if there is none."""
    files = sorted(folder.glob("*.crt"))
    if not files:
        raise UsageError(f"{folder} holds no certificate; make them with `penstock certs new`")
    return [Known(file, about(_read(file))) for file in files]


def warning(file: Path, now: datetime | None = None) -> str:
    """'' unless the certificate has ended or will soon."""
    left = Known(file, about(_read(file))).days_left(now or datetime.now(UTC))
    if left < 0:
        return f"the certificate {file} has expired"
    if left < RENEW_WITHIN_DAYS:
        return f"the certificate {file} expires in {left} days"
    return ""


def settings(folder: Path) -> str:
    """What to put into a configuration file."""
    place = folder.resolve()
    return (
        "front:\n"
        f"  tls_cert: {place / f'{_FRONT}.crt'}\n"
        f"  tls_key: {place / f'{_FRONT}.key'}\n"
        "tls:\n"
        f"  ca: {place / f'{_AUTHORITY}.crt'}\n"
        f"  cert: {place / f'{_MEMBER}.crt'}\n"
        f"  key: {place / f'{_MEMBER}.key'}\n"
        f"  cluster_token_file: {place / _TOKEN}\n"
    )


def _keep(folder: Path, name: str, pair: Pair) -> None:
    # The key first: whoever finds a certificate must find its key.
    _write(folder / f"{name}.key", pair.key, 0o600)
    _write(folder / f"{name}.crt", pair.cert, 0o644)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(
            f"cannot read {path} ({error.strerror}); `penstock certs new` makes it"
        ) from error


def _write(path: Path, content: bytes, mode: int) -> None:
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            os.chmod(name, mode)  # noqa: PTH101
            os.replace(name, path)  # noqa: PTH105
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error
