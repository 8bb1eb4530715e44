"""The pools and the front as Serve applications, alike for the launcher and for Kubernetes.

What a replica is told is its constructor's only argument; who calls decides whether that is the
whole spec (`cluster.launchers.ray`) or settings that it joins with its own environment
(`cluster.serve_apps`).
"""

from __future__ import annotations

from typing import Any, cast

from ray import serve
from ray.serve.config import RequestRouterConfig

from cluster.config import ClusterConfig
from cluster.pools import MAX_HOLDS, TargetedRouter
from cluster.scaler import serve_config

QUIET = {"log_level": "WARNING", "enable_access_log": False}
# Serve's decorator with a class as its first argument; its stubs know only the other form.
_deployment = cast(Any, serve.deployment)


def pool(
    replica: type,
    told: Any,
    *,
    role: str,
    config: ClusterConfig,
    retries: int,
    store_address: str,
    secrets: bool,
) -> Any:
    """The application of one pool; a replica is a worker with all its ranks.

    `secrets`: the autoscaler may be told the cluster's token; else it reads that in the environment
    of Serve's controller.
    """
    section = config.prefill if role == "prefill" else config.decode
    size: dict[str, Any] = {"num_replicas": section.replicas}
    if section.autoscaling.enabled:
        size = {
            "autoscaling_config": serve_config(
                section.autoscaling,
                role=role,
                replicas=section.replicas,
                store_address=store_address,
                peers=config.tls if secrets or config.tls.cluster_token is None else None,
            )
        }
    ranks = config.parallel.of_role(role).world
    gpus = 1 if config.model.device == "cuda" else 0
    extra = _own_resource(role, config)
    placement: dict[str, Any] = {}
    if ranks > 1:
        # One bundle a rank; the replica itself takes the first.
        bundle = {"CPU": 1, **({"GPU": gpus} if gpus else {}), **extra}
        placement = {
            "placement_group_bundles": [bundle] * ranks,
            "placement_group_strategy": "PACK",
        }
    router: Any = RequestRouterConfig(request_router_class=cast(Any, TargetedRouter))
    deployment = _deployment(
        replica,
        name=role,
        max_ongoing_requests=MAX_HOLDS,
        max_constructor_retry_count=retries,
        health_check_period_s=2.0,
        health_check_timeout_s=30.0,
        graceful_shutdown_timeout_s=config.launcher.drain_timeout_s,
        graceful_shutdown_wait_loop_s=0.2,
        ray_actor_options={"num_cpus": 1, "num_gpus": gpus, "resources": extra},
        **placement,
        **size,
        request_router_config=router,
        logging_config=QUIET,
    )
    return deployment.bind(told)


def front(replica: type, told: Any, *, config: ClusterConfig) -> Any:
    """The application of the HTTP front."""
    deployment = _deployment(
        serve.ingress()(replica),
        name="front",
        num_replicas=config.front.replicas,
        max_ongoing_requests=config.front.max_streams,
        graceful_shutdown_timeout_s=config.launcher.drain_timeout_s,
        graceful_shutdown_wait_loop_s=0.2,
        ray_actor_options={"num_cpus": 1, "resources": _own_resource("front", config)},
        logging_config=QUIET,
    )
    return deployment.bind(told)


def _own_resource(role: str, config: ClusterConfig) -> dict[str, float]:
    return {f"penstock_{role}": 1} if config.launcher.pool_resources else {}
