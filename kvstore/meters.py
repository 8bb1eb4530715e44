"""The store node's metrics, read from its own figures at each exposition."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from kvstore.data.port import DataPort
from kvstore.node import StoreNode
from penstock.telemetry import catalog as M
from penstock.telemetry.meters import Meters
from penstock.telemetry.metric import Metric

SOURCES: Mapping[str, Metric] = {
    "epoch": M.STORE_EPOCH,
    "capacity_bytes": M.STORE_CAPACITY,
    "used_bytes": M.STORE_USED,
    "reserved_bytes": M.STORE_RESERVED,
    "objects": M.STORE_OBJECTS,
    "leases": M.STORE_LEASES,
    "lease_owners": M.STORE_OWNERS,
    "subscribers": M.STORE_SUBSCRIBERS,
    "event_seq": M.STORE_EVENTS,
    "open_puts": M.STORE_PUTS,
    "open_gets": M.STORE_GETS,
    "evictions": M.STORE_EVICTIONS,
    "integrity_failures": M.STORE_INTEGRITY,
    "index_healthy": M.STORE_INDEX,
    "hits": M.STORE_HITS,
    "misses": M.STORE_MISSES,
    "bytes_in": M.STORE_IN,
    "bytes_out": M.STORE_OUT,
    "disk_capacity_bytes": M.STORE_DISK_CAPACITY,
    "disk_used_bytes": M.STORE_DISK_USED,
    "disk_file_bytes": M.STORE_DISK_FILES,
    "disk_queued_bytes": M.STORE_DISK_QUEUED,
    "disk_objects": M.STORE_DISK_OBJECTS,
    "disk_leases": M.STORE_DISK_LEASES,
    "disk_evictions": M.STORE_DISK_EVICTIONS,
    "disk_hits": M.STORE_DISK_HITS,
    "disk_written_bytes": M.STORE_DISK_WRITTEN,
    "disk_read_bytes": M.STORE_DISK_READ,
    "disk_skipped": M.STORE_DISK_SKIPPED,
    "disk_errors": M.STORE_DISK_ERRORS,
    "disk_quarantined": M.STORE_DISK_QUARANTINED,
    "object_capacity_bytes": M.STORE_OBJECT_CAPACITY,
    "object_used_bytes": M.STORE_OBJECT_USED,
    "object_queued_bytes": M.STORE_OBJECT_QUEUED,
    "object_objects": M.STORE_OBJECT_OBJECTS,
    "object_evictions": M.STORE_OBJECT_EVICTIONS,
    "object_hits": M.STORE_OBJECT_HITS,
    "object_written_bytes": M.STORE_OBJECT_WRITTEN,
    "object_read_bytes": M.STORE_OBJECT_READ,
    "object_skipped": M.STORE_OBJECT_SKIPPED,
    "object_errors": M.STORE_OBJECT_ERRORS,
    "object_quarantined": M.STORE_OBJECT_QUARANTINED,
    "object_resting": M.STORE_OBJECT_RESTING,
}
"""Metric by field of `StoreStat`."""


def store_meters(node: StoreNode, port: DataPort | None = None) -> Meters:
    meters = Meters("store")
    for field, metric in SOURCES.items():
        meters.read(metric, partial(_figure, node, field))
    meters.read(M.STORE_DATA_CONNECTIONS, lambda: 0.0 if port is None else float(port.connections))
    return meters


def _figure(node: StoreNode, field: str) -> float:
    return float(getattr(node.stat(), field))
