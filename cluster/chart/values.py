"""The chart's values as types: `values.schema.json` is made from these and from the product's own
configuration, so that a wrong value fails at `helm install` with the field's name.

Keys of the chart are camelCase as Helm's are; what stands under a `config` keeps the product's
names, because it is the product's configuration (`cluster.config`).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

Quantity = Annotated[
    str, Field(pattern=r"^[0-9]+(\.[0-9]+)?(m|k|Ki|M|Mi|G|Gi|T|Ti)?$", examples=["500m", "2Gi"])
]
ByteQuantity = Annotated[str, Field(pattern=r"^[0-9]+(Ki|Mi|Gi|Ti)$", examples=["512Mi"])]
Name = Annotated[str, Field(pattern=r"^([a-z0-9]([-a-z0-9.]*[a-z0-9])?)?$", max_length=253)]
"""A Kubernetes object's name, or empty."""
Sha256 = Annotated[str, Field(pattern=r"^(sha256:[0-9a-f]{64})?$")]


class Block(BaseModel):
    """Extra keys are refused; keys are camelCase."""

    model_config = ConfigDict(frozen=True, extra="forbid", alias_generator=to_camel)


def product(section: str) -> Any:
    """A `config` block: settings of the product's `section`, made strict by `cluster.chart.schema`
    with what the chart itself sets left out.
    """
    return Field(default={}, json_schema_extra={"x-section": section})


class Image(Block):
    repository: str = Field(min_length=1)
    tag: str = Field(pattern=r"^[A-Za-z0-9_.-]{0,128}$")
    digest: Sha256
    pull_policy: Literal["Always", "IfNotPresent", "Never"]
    pull_secrets: list[str]


class ModelSource(Block):
    type: Literal["shipped", "pvc", "hub", "object"]
    claim_name: Name
    path: str = Field(pattern=r"^([A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*)?$")
    uri: str
    revision: str
    digest: Sha256
    config_digest: Sha256
    size: ByteQuantity
    existing_secret: Name


class Model(Block):
    name: str = Field(min_length=1)
    served_name: str
    device: Literal["cpu", "cuda"]
    source: ModelSource
    config: dict[str, Any] = product("model")


class Gpu(Block):
    resource: str = Field(pattern=r"^[a-z0-9.-]+/[A-Za-z0-9._-]+$")
    product: str


class Resources(Block):
    requests: dict[str, Quantity]
    limits: dict[str, Quantity]


class EnvVar(Block):
    """Not for secrets: those come from a Secret by `valueFrom`."""

    name: str = Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    value: str | None = None
    value_from: dict[str, Any] | None = None


class Role(Block):
    """What every role of the cluster has, in this order."""

    replicas: int = Field(ge=1, le=1000)
    resources: Resources
    node_selector: dict[str, str]
    tolerations: list[dict[str, Any]]
    affinity: dict[str, Any]
    topology_spread: list[dict[str, Any]]
    priority_class_name: str
    shm_size: ByteQuantity
    startup_seconds: int = Field(ge=10, le=86_400)
    max_unavailable: int = Field(ge=1, le=1000)
    pod_annotations: dict[str, str]
    pod_labels: dict[str, str]
    extra_env: list[EnvVar]


class Pool(Role):
    config: dict[str, Any]
    gpu: Gpu


class PrefillPool(Pool):
    config: dict[str, Any] = product("prefill")


class DecodePool(Pool):
    config: dict[str, Any] = product("decode")


class Service(Block):
    type: Literal["ClusterIP", "NodePort", "LoadBalancer"]
    port: int = Field(ge=1, le=65_535)
    grpc_port: int = Field(ge=0, le=65_535)
    annotations: dict[str, str]


class FrontAuth(Block):
    enabled: bool
    existing_secret: Name
    keys_file_secret: Name


class FrontTls(Block):
    existing_secret: Name


class Front(Role):
    config: dict[str, Any] = product("front")
    service: Service
    auth: FrontAuth
    tls: FrontTls


class Disk(Block):
    size: str = Field(pattern=r"^([1-9][0-9]*(Gi|Ti))?$", examples=["500Gi"])
    storage_class: Name
    when_deleted: Literal["Delete", "Retain"]


class KvStore(Role):
    replicas: Literal[1]
    config: dict[str, Any] = product("kvstore")
    disk: Disk


class Head(Role):
    replicas: Literal[1]


class CertManager(Block):
    enabled: bool
    issuer_ref: dict[str, str]


class Tls(Block):
    existing_secret: Name
    token_secret: Name
    cert_manager: CertManager


class RedisBundled(Block):
    enabled: bool
    image: str = Field(pattern=r"^[^\s]+(:[^\s:]+)?(@sha256:[0-9a-f]{64})?$")
    max_memory: ByteQuantity
    resources: Resources


class RedisExternal(Block):
    url: str = Field(pattern=r"^(rediss?://[^@\s]+)?$")
    existing_secret: Name


class Redis(Block):
    bundled: RedisBundled
    external: RedisExternal


class RayAuth(Block):
    enabled: bool
    existing_secret: Name


class GcsFaultTolerance(Block):
    enabled: bool
    redis_address: str
    existing_secret: Name
    username_key: str
    password_key: str


class Upgrade(Block):
    strategy: Literal["None", "NewCluster"]
    deletion_delay_seconds: int = Field(ge=0)


class Ray(Block):
    version: str = Field(pattern=r"^[0-9]+\.[0-9]+\.[0-9]+$")
    auth: RayAuth
    object_store_memory: ByteQuantity
    drain_seconds: int = Field(ge=0, le=86_400)
    gcs_fault_tolerance: GcsFaultTolerance
    upgrade: Upgrade


class Ingress(Block):
    enabled: bool
    class_name: str
    host: str
    annotations: dict[str, str]
    tls_secret: Name


class HttpRoute(Block):
    enabled: bool
    parent_refs: list[dict[str, Any]]
    hostnames: list[str]
    timeout: str = Field(pattern=r"^([0-9]{1,5}(h|m|s|ms)){1,4}$")


class NetworkPolicy(Block):
    enabled: bool
    front_from: list[dict[str, Any]]
    operator_namespace: str
    egress_to: list[dict[str, Any]]


class Monitoring(Block):
    pod_monitor: bool
    service_monitor: bool
    interval: str = Field(pattern=r"^[0-9]+(ms|s|m|h)$")
    labels: dict[str, str]
    prometheus_rule: bool
    dashboards: bool
    namespace: str


class HelmTest(Block):
    question: str
    expect: str
    timeout_seconds: int = Field(ge=10, le=86_400)


class Values(Block):
    """All of `values.yaml`."""

    name_override: Name
    fullname_override: Name
    service_account_annotations: dict[str, str]
    image: Image
    model: Model
    parallel: dict[str, Any] = product("parallel")
    telemetry: dict[str, Any] = product("telemetry")
    batch: dict[str, Any] = product("batch")
    router: dict[str, Any] = product("router")
    head: Head
    prefill: PrefillPool
    decode: DecodePool
    front: Front
    kvstore: KvStore
    tls: Tls
    redis: Redis
    ray: Ray
    ingress: Ingress
    http_route: HttpRoute
    network_policy: NetworkPolicy
    monitoring: Monitoring
    test: HelmTest
