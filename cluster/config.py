"""The joined configuration: every room's section, and where each value came from.

Precedence: command-line flag > `PENSTOCK_SECTION__FIELD` > YAML file (`--config`) > default.
"""

from __future__ import annotations

import hashlib
import ipaddress
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, Field, model_validator

from cluster.autoscale import AutoscalingSection
from cluster.batch.config import BatchSection
from cluster.policy import RoutingPolicy
from kvstore.config import StoreConfig
from penstock.errors import UsageError
from penstock.peers import Peers
from penstock.settings import Section, Size, did_you_mean, validated
from penstock.telemetry_spec import TelemetrySpec
from penstock.worker import ModelSpec, RankSpec

ENV_PREFIX = "PENSTOCK_"
_OTLP_VARIABLE = "OTEL_EXPORTER_OTLP_ENDPOINT"
# Read by rooms that start without this file.
_ELSEWHERE = frozenset({"kernels"})
SECRETS = frozenset(
    {
        "front.api_key",
        "front.cluster_key",
        "kvstore.redis_url",
        "tls.cluster_token",
        "batch.journal_url",
    }
)


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class FrontSection(Section):
    """The HTTP front door."""

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    api_key: str | None = Field(default=None, repr=False, min_length=1)
    """One key, or several separated by commas; each is a tenant of its own."""
    api_keys_file: str | None = None
    """File of hashed keys with tenants, scopes and limits (`penstock keys`); read again when it
    changes.
    """
    cluster_key: str | None = Field(default=None, repr=False, min_length=16)
    """Secret of the block namespaces; set the same one on every front of a cluster."""
    tls_cert: str | None = None
    tls_key: str | None = None
    insecure: bool = False
    """Allows another address than loopback without a key and TLS."""
    replicas: int = Field(default=1, ge=1)
    max_streams: int = Field(default=1024, ge=1)
    """Most requests in one front process; one more is refused with 429."""
    max_body_bytes: Size = Field(default=64 << 20, ge=1024)
    max_bodies_bytes: Size = Field(default=1 << 30, ge=1024)
    """Bodies of all requests in progress in one front process together."""
    body_timeout_s: float = Field(default=60.0, gt=0)
    """How long a body may take; large ones get more, one second for each 16 KiB that came."""
    max_header_bytes: Size = Field(default=32 << 10, ge=1024)
    """A request's line and headers."""
    header_timeout_s: float = Field(default=20.0, gt=0)
    """How long a connection may take for a request's line and headers."""
    max_connections: int = Field(default=8192, ge=1)
    write_stall_s: float = Field(default=60.0, gt=0)
    """How long a client may read nothing while an answer waits; then it is hung up on."""
    default_max_tokens: int = Field(default=1024, ge=1)
    keep_alive_s: float = Field(default=5.0, gt=0)
    """Longest silence of a stream: then a comment is sent. Also how long a stream waits for its
    first event before it commits to status 200.
    """
    request_timeout_s: float = Field(default=3600.0, gt=0)
    admission_timeout_s: float = Field(default=30.0, gt=0)
    """Longest wait for a place at a decode worker; refused at once if it is predicted to be longer.
    """
    max_prefill_wait_s: float = Field(default=600.0, gt=0)
    """A prompt is refused at once if its prefill worker predicts a longer line in front of it."""
    failover_timeout_s: float = Field(default=30.0, ge=0)
    """How long a request whose worker or store failed looks for another to go on with."""
    stream_kept_s: float = Field(default=600.0, ge=0)
    """How long a client with an X-Request-Id may come back for a stream after its end; 0: never."""
    stream_kept_bytes: Size = Field(default=64 << 20, ge=0)
    """Tokens that one front keeps for such clients; what is beyond is drawn again."""
    encode_threads: int = Field(default=2, ge=1)

    @model_validator(mode="after")
    def _exposure(self) -> Self:
        if self.max_bodies_bytes < self.max_body_bytes:
            raise ValueError(
                f"max_bodies_bytes ({self.max_bodies_bytes}) must not be below max_body_bytes "
                f"({self.max_body_bytes})"
            )
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key must be given together")
        asks = self.api_key is not None or self.api_keys_file is not None
        safe = asks and self.tls_cert is not None
        if not (is_loopback(self.host) or safe or self.insecure):
            raise ValueError(
                f"host {self.host} is reachable from other machines: give an API key "
                "(--api-key or --api-keys-file) and TLS (--tls-cert, --tls-key) with it, or "
                "--insecure"
            )
        if not self.keys and self.api_key is not None:
            raise ValueError("api_key holds no key")
        return self

    @property
    def keys(self) -> tuple[str, ...]:
        """Accepted API keys; empty means that none is asked for."""
        return tuple(k.strip() for k in (self.api_key or "").split(",") if k.strip())

    @property
    def cluster_key_bytes(self) -> bytes:
        """Without a key of its own a cluster is one machine's: namespaces then keep tenants apart
        but are no secret.
        """
        return hashlib.sha256((self.cluster_key or "one machine").encode()).digest()


class ModelSection(ModelSpec):
    """Which model, and how it is opened; every worker is told the same."""

    model: str = "ledger"
    kv_cache_dtype: Literal["fp8", "bf16", "fp32"] = "fp8"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    numerics: Literal["exact", "fast"] = "exact"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    max_model_len: int | None = Field(default=None, ge=16)


class PrefillSection(Section):
    replicas: int = Field(default=1, ge=1)
    autoscaling: AutoscalingSection = AutoscalingSection()
    chunk_tokens: int = Field(default=2048, ge=16)
    max_running: int = Field(default=8, ge=1)
    max_queued: int = Field(default=256, ge=0)
    kv_memory_bytes: Size = Field(default=1 << 30, ge=1 << 16)


class DecodeSection(Section):
    replicas: int = Field(default=1, ge=1)
    autoscaling: AutoscalingSection = AutoscalingSection()
    max_running: int = Field(default=16, ge=1)
    max_queued: int = Field(default=256, ge=0)
    answer_room_tokens: int = Field(default=1024, ge=16)
    """Of an answer, for which a place has room before the prompt is read; it grows by as much."""
    grant_ttl_s: float = Field(default=120.0, gt=0)
    """A place that no prefill worker has begun to fill after so long goes to the next request."""
    kv_memory_bytes: Size = Field(default=1 << 30, ge=1 << 16)


class KvStoreSection(StoreConfig):
    """The store node: its own room's settings, with sizes as people write them."""

    memory_bytes: Size = Field(default=2 << 30, ge=1)
    max_object_bytes: Size = Field(default=1 << 28, ge=1)
    disk_bytes: Size = Field(default=0, ge=0)
    disk_extent_bytes: Size = Field(default=32 << 20, ge=1 << 16)
    disk_queue_bytes: Size = Field(default=256 << 20, ge=0)
    object_bytes: Size = Field(default=1 << 40, ge=1)
    object_queue_bytes: Size = Field(default=256 << 20, ge=0)


class ParallelSection(Section):
    """Over how many ranks one worker's model is cut (docs/parallel.md)."""

    tensor: int = Field(default=1, ge=1, le=4096)
    """Ranks that share heads, output groups and the width of every expert."""
    expert: int = Field(default=1, ge=1, le=4096)
    """Ranks that share the routed experts; heads and output groups are cut over them as well."""
    prefill_context: int = Field(default=1, ge=1, le=4096)
    """Ranks of a prefill worker that share a chunk's rows."""
    timeout_s: float = Field(default=60.0, gt=0)
    """Longest wait of one rank for another in the middle of a model step; then the worker is given
    up and replaced.
    """

    def of_role(self, role: str) -> RankSpec:
        """The ranks of a `prefill` or `decode` worker."""
        context = self.prefill_context if role == "prefill" else 1
        return RankSpec(
            tensor=self.tensor, expert=self.expert, context=context, timeout_s=self.timeout_s
        )


class RouterSection(Section):
    """Which workers a request goes to (docs/routing.md)."""

    policy: RoutingPolicy = RoutingPolicy.COST
    """`cost` (the pair that is predicted to answer soonest), or what others do: `round-robin`,
    `least-load`, `block-overlap`.
    """


class LauncherSection(Section):
    """What starts the processes."""

    kind: Literal["ray", "local"] = "ray"
    ray_address: str | None = None
    """Address of a Ray cluster to join; else the launcher starts a Ray of its own."""
    object_store_bytes: Size = Field(default=128 << 20, ge=80 << 20)
    """Shared memory of a Ray of its own; neither tokens nor KV pass through it."""
    worker_host: str = "127.0.0.1"
    store_address: str | None = None
    """HOST:PORT of a store node that runs already; else one is started."""
    start_timeout_s: float = Field(default=180.0, gt=0)
    drain_timeout_s: float = Field(default=30.0, ge=0)
    pool_resources: bool = False
    """Each rank asks for one unit of the Ray resource `penstock_prefill` or `penstock_decode`, each
    front for one of `penstock_front`: they run only on nodes that offer them.
    """
    ready_file: str | None = None
    """File that holds a replica's process id and Ray node for as long as the replica serves."""


class TelemetrySection(TelemetrySpec):
    """Metrics, traces and logs; every process is told the same."""


class ClusterConfig(Section):
    """All of it. Travels as JSON from the launcher to the processes."""

    front: FrontSection = FrontSection()
    model: ModelSection = ModelSection()
    prefill: PrefillSection = PrefillSection()
    decode: DecodeSection = DecodeSection()
    kvstore: KvStoreSection = KvStoreSection()
    router: RouterSection = RouterSection()
    parallel: ParallelSection = ParallelSection()
    launcher: LauncherSection = LauncherSection()
    telemetry: TelemetrySection = TelemetrySection()
    batch: BatchSection = BatchSection()
    tls: Peers = Peers()
    """Between the cluster's own processes; the front's certificate is `front.tls_cert`."""

    @model_validator(mode="after")
    def _inside(self) -> Self:
        where = {
            "launcher.worker_host": self.launcher.worker_host,
            "kvstore.listen": self.kvstore.listen.rpartition(":")[0],
        }
        if self.kvstore.data_listen:
            where["kvstore.data_listen"] = self.kvstore.data_listen.rpartition(":")[0]
        for name, host in where.items():
            guarded = self.tls.secure and self.tls.has_token
            if not (is_loopback(host) or guarded or self.front.insecure):
                raise ValueError(
                    f"{name} {host} is reachable from other machines: give tls.ca, tls.cert, "
                    "tls.key and tls.cluster_token_file (`penstock certs new` makes all four), or "
                    "--insecure"
                )
        return self

    @property
    def served_name(self) -> str:
        """The name under which clients ask for the model."""
        return self.model.served_name or Path(self.model.model).name or self.model.model

    def model_spec(self) -> ModelSpec:
        spec = ModelSpec(**self.model.model_dump())
        return spec.model_copy(update={"served_name": self.served_name})


@dataclass(frozen=True)
class Setting:
    """One value of the resolved configuration."""

    name: str
    value: Any
    origin: str

    @property
    def shown(self) -> Any:
        """The value, unless it is a secret."""
        return "(secret)" if self.name in SECRETS and self.value is not None else self.value


@dataclass(frozen=True)
class Resolved:
    config: ClusterConfig
    origins: Mapping[str, str]
    """By dotted name, for each value that is not a default."""

    def settings(self) -> list[Setting]:
        values = _flatten(self.config.model_dump())
        return [Setting(n, v, self.origins.get(n, "default")) for n, v in values]


def resolve(
    flags: Mapping[str, Any] | None = None,
    *,
    file: Path | None = None,
    settings: Mapping[str, Any] | None = None,
    env: Mapping[str, str] | None = None,
) -> Resolved:
    """Joins the layers. `flags` maps dotted names to values; None means not given. `settings` is
    what a file would hold: the arguments of a Serve application (`cluster.serve_apps`).

    Raises `UsageError` in one sentence that names the setting and the layer it came from.
    """
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    env = os.environ if env is None else env
    layers = (
        _from_standard(env),
        _from_file(file),
        _from_sections(settings or {}, "settings"),
        _from_env(env),
    )
    for layer in (*layers, [(n, v, "command line") for n, v in (flags or {}).items()]):
        for name, value, origin in layer:
            if value is not None or origin.startswith(("file", "settings")):
                _put(values, name, value)
                origins[name] = origin
    return Resolved(validated(ClusterConfig, values, origins), origins)


def schema() -> dict[str, Any]:
    """JSON schema of the configuration file."""
    return ClusterConfig.model_json_schema()


_Layer = Iterable[tuple[str, Any, str]]


def _from_file(file: Path | None) -> _Layer:
    if file is None:
        return
    import yaml

    try:
        content = yaml.safe_load(file.read_bytes())
    except OSError as error:
        raise UsageError(
            f"cannot read the configuration {file}: {error.strerror}; check the path after --config"
        ) from error
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"{file} is not valid YAML: {reason}") from error
    if content is None:
        return
    if not isinstance(content, dict):
        raise UsageError(f"{file} must hold sections such as 'front:', not a {type(content)}")
    yield from _from_sections(content, f"file {file}")


def _from_sections(content: Mapping[str, Any], origin: str) -> _Layer:
    for section, fields in content.items():
        _known_section(str(section), origin)
        if not isinstance(fields, dict):
            raise UsageError(f"section '{section}' ({origin}) must hold settings, one per line")
        for name, value in _flatten(fields):
            yield f"{section}.{name}", value, origin


def _from_env(env: Mapping[str, str]) -> _Layer:
    for variable, value in sorted(env.items()):
        section, separator, name = variable.removeprefix(ENV_PREFIX).partition("__")
        if not variable.startswith(ENV_PREFIX) or not separator:
            continue
        section = section.lower()
        if section in _ELSEWHERE:
            continue
        _known_section(section, f"env {variable}")
        yield f"{section}.{name.lower().replace('__', '.')}", value, f"env {variable}"


def _from_standard(env: Mapping[str, str]) -> _Layer:
    """Variables that others have named; everything of our own goes before them."""
    if endpoint := env.get(_OTLP_VARIABLE):
        yield "telemetry.otlp_endpoint", endpoint, f"env {_OTLP_VARIABLE}"


def _known_section(section: str, origin: str) -> None:
    known = ClusterConfig.model_fields
    if section not in known:
        hint = did_you_mean(section, known)
        raise UsageError(f"unknown section '{section}' ({origin}){hint}", param=section)


def _put(values: dict[str, Any], name: str, value: Any) -> None:
    *path, last = name.split(".")
    for part in path:
        values = values.setdefault(part, {})
    values[last] = value


def _flatten(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    flat = []
    for key, value in values.items():
        if isinstance(value, BaseModel | dict):
            flat += _flatten(dict(value), f"{prefix}{key}.")
        else:
            flat.append((f"{prefix}{key}", value))
    return flat
