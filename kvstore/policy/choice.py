"""A policy by its name in the settings."""

from __future__ import annotations

from enum import StrEnum

from kvstore.policy.contracts import EvictionPolicy
from kvstore.policy.lru import LeastRecentlyUsed
from kvstore.policy.reuse import ReuseTree
from kvstore.policy.s3_fifo import S3Fifo


class Eviction(StrEnum):
    """Which objects leave a full store first."""

    REUSE = "reuse"
    LRU = "lru"
    S3_FIFO = "s3-fifo"


def open_policy(name: Eviction, capacity_bytes: int) -> EvictionPolicy:
    """A fresh policy for a store of `capacity_bytes`."""
    match name:
        case Eviction.REUSE:
            return ReuseTree(capacity_bytes)
        case Eviction.LRU:
            return LeastRecentlyUsed()
        case Eviction.S3_FIFO:
            return S3Fifo(capacity_bytes)
