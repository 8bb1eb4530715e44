"""An object tier from the node's settings."""

from __future__ import annotations

from collections.abc import Callable

from kvstore.catalog import Catalog, Limits
from kvstore.config import StoreConfig
from kvstore.objects.bucket import open_bucket
from kvstore.objects.tier import ObjectTier
from kvstore.policy.choice import Eviction, open_policy


def open_objects(config: StoreConfig, *, clock: Callable[[], float]) -> ObjectTier:
    """Does not speak to the bucket yet. Raises UsageError for a URL that nothing serves."""
    limits = Limits(
        capacity_bytes=config.object_bytes,
        max_object_bytes=config.max_object_bytes,
        max_objects=config.max_objects,
        max_leases=config.max_leases,
        max_lease_ttl_s=config.max_lease_ttl_s,
    )
    # A listing tells when an object was written and no more: nothing for a policy of prompts.
    policy = open_policy(Eviction.LRU, config.object_bytes)
    return ObjectTier(
        open_bucket(config.object_url),
        Catalog(limits, policy=policy, clock=clock),
        after_uses=config.object_after_uses,
        queue_bytes=config.object_queue_bytes,
        readers=config.object_readers,
        read_s=config.object_read_s,
        list_s=config.object_list_s,
    )
