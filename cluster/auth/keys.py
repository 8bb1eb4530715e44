"""API keys: how one is made, how the key file holds it.

A key is `pen-ID-SECRET`: 12 hex digits by which it is found, and 256 random bits in base64url. The
file holds the SHA-256 of the whole key. A slow KDF protects passwords, which people choose and
attackers can list; nobody can list 2^256 secrets, so it would add no strength here, and would cost
every request tens of milliseconds of CPU that a stranger could make the server spend.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import orjson
from pydantic import AwareDatetime, Field, ValidationError, field_validator, model_validator

from cluster.auth.contracts import ApiScope, Caller, Limits
from penstock.errors import UsageError
from penstock.settings import Section

MAX_FILE_BYTES = 8 << 20
MAX_KEYS = 10_000
_KEY = re.compile(r"pen-([0-9a-f]{12})-[A-Za-z0-9_-]{43}")
# At most 63 characters, so that no name equals the digest that names the tenant of an `api_key`.
TENANT = r"[a-z0-9](?:[a-z0-9._-]{0,61}[a-z0-9])?"
_Limit = Annotated[int, Field(ge=1)] | None


class KeyLimits(Section):
    """The file's form of `Limits`."""

    requests_per_minute: _Limit = None
    tokens_per_minute: _Limit = None
    tokens_per_day: _Limit = None
    concurrent_requests: _Limit = None
    max_prompt_tokens: _Limit = None


class KeyRecord(Section):
    """One key. Its secret is not here."""

    id: str = Field(pattern=r"^[0-9a-f]{12}$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", repr=False)
    tenant: str = Field(pattern=f"^{TENANT}$")
    name: str = Field(default="", max_length=128)
    scopes: tuple[ApiScope, ...] = ("generate", "batch", "read")
    created: AwareDatetime | None = None
    expires: AwareDatetime | None = None
    revoked: bool = False
    limits: KeyLimits = KeyLimits()

    @field_validator("created", "expires", mode="before")
    @classmethod
    def _zone(cls, value: Any) -> Any:
        # YAML reads a time without a zone as a naive one; a file means UTC.
        naive = isinstance(value, datetime) and value.tzinfo is None
        return value.replace(tzinfo=UTC) if naive else value

    def caller(self) -> Caller:
        return Caller(
            tenant=self.tenant,
            key_id=self.id,
            name=self.name,
            scopes=frozenset(self.scopes),
            limits=Limits(**self.limits.model_dump()),
        )

    def state(self, now: datetime) -> str:
        """`active`, `expired` or `revoked`."""
        if self.revoked:
            return "revoked"
        return "expired" if self.expires is not None and self.expires <= now else "active"


class KeyFile(Section):
    """The whole file."""

    version: Literal[1] = 1
    keys: tuple[KeyRecord, ...] = Field(default=(), max_length=MAX_KEYS)

    @model_validator(mode="after")
    def _distinct(self) -> KeyFile:
        seen: set[str] = set()
        for key in self.keys:
            if key.id in seen:
                raise ValueError(f"two keys have the id {key.id}")
            seen.add(key.id)
        return self


@dataclass(frozen=True)
class NewKey:
    """A key that has just been made: `text` is shown once and kept nowhere."""

    text: str
    record: KeyRecord


def digest_of(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def id_of(key: str) -> str | None:
    """The id within a key of our form, else None."""
    match = _KEY.fullmatch(key)
    return match.group(1) if match else None


def new_key(
    *,
    tenant: str,
    name: str = "",
    scopes: Iterable[str] = ("generate", "batch", "read"),
    expires: datetime | None = None,
    limits: KeyLimits | None = None,
    taken: Iterable[str] = (),
) -> NewKey:
    """A fresh key whose id is none of `taken`. Raises UsageError for a wrong field."""
    used = set(taken)
    while (key_id := secrets.token_hex(6)) in used:
        continue
    text = f"pen-{key_id}-{secrets.token_urlsafe(32)}"
    values = {
        "id": key_id,
        "sha256": digest_of(text).hex(),
        "tenant": tenant,
        "name": name,
        "scopes": tuple(scopes),
        "created": datetime.now(UTC).replace(microsecond=0),
        "expires": expires,
        "limits": limits or KeyLimits(),
    }
    try:
        return NewKey(text, KeyRecord.model_validate(values))
    except ValidationError as error:
        raise UsageError(_sentence("the new key", error)) from None


def parse_keys(raw: bytes, place: str) -> KeyFile:
    """Raises UsageError: one sentence with the file, the key and what is wrong. Shows no value."""
    if len(raw) > MAX_FILE_BYTES:
        raise UsageError(f"{place} has {len(raw)} bytes; a key file has at most {MAX_FILE_BYTES}")
    try:
        content = orjson.loads(raw)
    except orjson.JSONDecodeError:
        import yaml

        try:
            content = yaml.safe_load(raw)
        except (yaml.YAMLError, RecursionError, ValueError) as error:
            mark = getattr(error, "problem_mark", None)
            line = f" (line {mark.line + 1})" if mark is not None else ""
            raise UsageError(f"{place} is neither JSON nor YAML{line}") from None
    if not isinstance(content, dict):
        raise UsageError(f"{place} must hold 'keys:' with a list; `penstock keys new` writes one")
    try:
        return KeyFile.model_validate(content)
    except ValidationError as error:
        raise UsageError(_sentence(place, error)) from None


def read_keys(path: Path) -> KeyFile:
    """Raises UsageError if there is no such file or it is wrong."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise UsageError(
            f"cannot read the key file {path}: {error.strerror}; make one with "
            f"`penstock keys new --file {path} --tenant NAME`"
        ) from error
    return parse_keys(raw, f"the key file {path}")


def _sentence(place: str, error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    where = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in first["loc"]).lstrip(".")
    message = first["msg"].removeprefix("Value error, ")
    return f"{place}: {where}: {message}" if where else f"{place}: {message}"
