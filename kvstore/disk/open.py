"""A disk tier from the node's settings."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from kvstore.catalog import Catalog, Limits
from kvstore.config import StoreConfig
from kvstore.disk.files import DiskFiles
from kvstore.disk.tier import DiskTier
from kvstore.policy.choice import open_policy

_LIVE_SHARE = 0.75
"""Part of the files that live objects may fill. The rest are holes: with a quarter of them the
emptiest extent costs at most three bytes of copying for one that it wins.
"""


def open_disk(
    config: StoreConfig,
    *,
    clock: Callable[[], float],
    added: Callable[[bytes], None],
    removed: Callable[[bytes], None],
) -> DiskTier:
    """Reads the folder's log; blocks for seconds when it names a million objects.

    Raises UsageError for a folder that cannot be used, or is in use by another node.
    """
    # While an extent is compacted its live objects are there twice.
    size_bytes = config.disk_bytes - config.disk_extent_bytes
    limits = Limits(
        capacity_bytes=int(size_bytes * _LIVE_SHARE),
        max_object_bytes=min(config.max_object_bytes, config.disk_extent_bytes),
        max_objects=config.max_objects,
        max_leases=config.max_leases,
        max_lease_ttl_s=config.max_lease_ttl_s,
    )
    policy = open_policy(config.eviction, limits.capacity_bytes)
    files = DiskFiles(
        _folder(config),
        size_bytes=size_bytes,
        extent_bytes=config.disk_extent_bytes,
    )
    return DiskTier(
        files,
        Catalog(limits, policy=policy, clock=clock),
        queue_bytes=config.disk_queue_bytes,
        readers=config.disk_readers,
        sync_s=config.disk_sync_s,
        added=added,
        removed=removed,
    )


def disk_folder(config: StoreConfig) -> Path | None:
    """Where the disk tier lies; None without one."""
    return _folder(config) if config.disk_bytes else None


def _folder(config: StoreConfig) -> Path:
    return Path(config.disk_dir) if config.disk_dir else default_folder()


def default_folder() -> Path:
    """`penstock/kv` in the user's cache folder (XDG Base Directory)."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "penstock" / "kv"
