"""Settings of one store node. Frozen, extra keys refused; sizes in bytes, times in seconds."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, model_validator

from kvstore.policy.choice import Eviction
from penstock.peers import ALONE, Peers
from penstock.telemetry_spec import TelemetrySpec

MAX_IDS_PER_CALL = 65_536
"""Most ids in one Has, Get or Lease: 16 million tokens' blocks, about 2.2 MiB on the wire."""


class StoreConfig(BaseModel):
    """One node: where it listens, what it holds, and the bounds on every call."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    listen: str = "127.0.0.1:0"
    """HOST:PORT; port 0 takes a free one."""
    data_listen: str = ""
    """HOST:PORT of the data port; empty: a free one of the same host."""
    data_connections: int = Field(default=256, ge=0)
    """Most connections to the data port, a thread each; 0: no data port, all goes over gRPC."""
    node_id: str = Field(default="", max_length=128)
    """Name in the index; empty: a random one for each start."""
    memory_bytes: int = Field(default=1 << 30, ge=1)
    """Budget of the memory tier: payload and headers of all objects, reservations included."""
    disk_bytes: int = Field(default=0, ge=0)
    """Size of the disk tier, holes and a file under compaction included; 0: none."""
    disk_dir: str = ""
    """Its folder, this node's alone; empty: `penstock/kv` in the user's cache folder."""
    disk_extent_bytes: int = Field(default=32 << 20, ge=1 << 16)
    """Size of one file of the disk tier."""
    disk_queue_bytes: int = Field(default=256 << 20, ge=0)
    """Most bytes waiting for the disk; beyond it objects stay in memory alone."""
    disk_readers: int = Field(default=4, ge=1, le=64)
    """Reads of the disk at once."""
    disk_sync_s: float = Field(default=1.0, gt=0)
    """What a power cut may lose; a killed process loses nothing that was written."""
    object_url: str = ""
    """Bucket of the object tier as fsspec names it (`s3://bucket/prefix`, `file:///folder`); nodes
    may share it. Credentials come from the environment. Empty: none.
    """
    object_bytes: int = Field(default=1 << 40, ge=1)
    """Most bytes in the bucket, those of other nodes included; the oldest unleased leave."""
    object_after_uses: int = Field(default=1, ge=0)
    """Requests beside the first that must have wanted an object before it is written there."""
    object_queue_bytes: int = Field(default=256 << 20, ge=0)
    """Most bytes waiting for the bucket; beyond it objects are not written there."""
    object_readers: int = Field(default=8, ge=1, le=64)
    """Calls of the bucket at once."""
    object_read_s: float = Field(default=2.0, gt=0)
    """Longest that a request waits for one object of the bucket; then the tier rests."""
    object_list_s: float = Field(default=300.0, gt=0)
    """How often the bucket is listed, to see what other nodes wrote and deleted."""
    eviction: Eviction = Eviction.REUSE
    """Which objects leave a full store first."""
    max_object_bytes: int = Field(default=1 << 28, ge=1)
    """Largest single object."""
    max_objects: int = Field(default=1 << 20, ge=1)
    """Most objects at once, so that tiny ones cannot outgrow the byte budget in bookkeeping."""
    max_leases: int = Field(default=1 << 22, ge=1)
    """Most (owner, object) leases at once."""
    max_lease_ttl_s: float = Field(default=600.0, gt=0)
    """Longer leases are shortened to this; renew them instead."""
    max_wait_s: float = Field(default=600.0, ge=0)
    """Longest wait for one object's commit in Get."""
    max_message_bytes: int = Field(default=4 << 20, ge=1 << 16)
    """Largest gRPC message accepted."""
    chunk_bytes: int = Field(default=1 << 20, ge=1 << 10)
    """Data bytes in one message of Get."""
    max_concurrent_calls: int = Field(default=4096, ge=1)
    max_open_puts: int = Field(default=4096, ge=1)
    """Most objects being written at once; one more is refused, not queued."""
    max_open_gets: int = Field(default=2048, ge=1)
    put_idle_s: float = Field(default=15.0, gt=0)
    """A Put stream that sends nothing for so long is ended and its bytes given back."""
    get_stall_s: float = Field(default=60.0, gt=0)
    """A Get stream whose reader takes nothing for so long is ended."""
    max_subscribers: int = Field(default=64, ge=1)
    """Most mirrors that follow the node's changes."""
    max_event_backlog: int = Field(default=32_768, ge=1)
    """Most changes that wait for one mirror; beyond it the mirror begins again with a snapshot."""
    max_workers: int = Field(default=4096, ge=1)
    """Most workers in the directory."""
    max_worker_ttl_s: float = Field(default=60.0, gt=0)
    redis_url: str | None = None
    """redis:// or rediss:// URL of the index; None: the index inside the node."""
    index_entry_ttl_s: float = Field(default=600.0, gt=1)
    """Safety TTL of index entries; the node refreshes them within half of it."""
    heartbeat_s: float = Field(default=1.0, gt=0)
    announce_batch: int = Field(default=512, ge=1)
    """Index entries written in one round trip."""
    announce_per_s: float = Field(default=10_000.0, gt=0)
    """Most index entries announced in a second after the index was lost."""
    max_pending_announcements: int = Field(default=65_536, ge=1)
    """Beyond this many unsent changes the node forgets them and announces everything again."""

    @model_validator(mode="after")
    def _disk_has_room(self) -> StoreConfig:
        least = 8 * self.disk_extent_bytes
        if self.disk_bytes and self.disk_bytes < least:
            raise ValueError(
                f"disk_bytes ({self.disk_bytes}) must be 0 or at least 8 files of "
                f"disk_extent_bytes, {least}"
            )
        return self

    @model_validator(mode="after")
    def _chunk_fits_message(self) -> StoreConfig:
        if self.chunk_bytes + 64 > self.max_message_bytes:
            raise ValueError(
                f"chunk_bytes ({self.chunk_bytes}) must stay 64 bytes below max_message_bytes "
                f"({self.max_message_bytes})"
            )
        return self


class StoreSpec(StoreConfig):
    """All that a store process is told by its launcher."""

    peers: Peers = ALONE
    telemetry: TelemetrySpec = TelemetrySpec()
