"""Settings of the product that the chart sets itself, so that they stand under no `config`: by
which value, or why by none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Owned:
    """`value`: the dotted value that sets it; "" where nothing should."""

    value: str
    why: str


def _by(value: str) -> Owned:
    return Owned(value, f"set by {value}")


OWNED: Mapping[str, Owned] = {
    "front.host": Owned("", "Serve's proxies listen; the pod's own address for gRPC"),
    "front.port": Owned("", "8000 in the pod; front.service.port is what others see"),
    "front.api_key": _by("front.auth.existingSecret"),
    "front.api_keys_file": _by("front.auth.keysFileSecret"),
    "front.cluster_key": Owned("", "generated, in the release's Secret"),
    "front.tls_cert": Owned("", "front.tls.existingSecret gives it to Serve's proxies"),
    "front.tls_key": Owned("", "front.tls.existingSecret gives it to Serve's proxies"),
    "front.insecure": Owned("", "for gRPC without front.tls, behind a Gateway as HTTP is"),
    "front.replicas": _by("front.replicas"),
    "model.model": _by("model.name"),
    "model.served_name": _by("model.servedName"),
    "model.device": _by("model.device"),
    "prefill.replicas": _by("prefill.replicas"),
    "decode.replicas": _by("decode.replicas"),
    "kvstore.listen": Owned("", "port 7070 of its pod"),
    "kvstore.data_listen": Owned("", "port 7071 of its pod"),
    "kvstore.node_id": Owned("", "the pod's name"),
    "kvstore.disk_bytes": _by("kvstore.disk.size"),
    "kvstore.disk_dir": Owned("", "in the claim of kvstore.disk"),
    "kvstore.redis_url": _by("redis.external.url"),
    "tls.ca": _by("tls.existingSecret"),
    "tls.cert": _by("tls.existingSecret"),
    "tls.key": _by("tls.existingSecret"),
    "tls.cluster_token": Owned("", "from a file"),
    "tls.cluster_token_file": _by("tls.tokenSecret"),
    "telemetry.metrics_host": Owned("", "no exporter of a process's own: see metrics_port"),
    "telemetry.metrics_port": Owned("", "each front's /metrics has those of all, for the chart"),
    "batch.grpc_port": _by("front.service.grpcPort"),
    "launcher.kind": Owned("", "KubeRay deploys"),
    "launcher.ray_address": Owned("", "KubeRay deploys"),
    "launcher.object_store_bytes": Owned("", "ray.objectStoreMemory gives it to each Ray node"),
    "launcher.worker_host": Owned("", "the pod's own address"),
    "launcher.store_address": Owned("", "the release's store"),
    "launcher.start_timeout_s": _by("prefill.startupSeconds"),
    "launcher.drain_timeout_s": _by("ray.drainSeconds"),
    "launcher.pool_resources": Owned("", "always: a pool's workers belong on its own pods"),
    "launcher.ready_file": Owned("", "read by the pods' probes"),
}
