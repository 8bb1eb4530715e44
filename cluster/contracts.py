"""The seams of the cluster: `Launcher` (what starts processes) and `Service` (what the HTTP API
calls).
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from penstock.peers import ALONE, Peers
from penstock.request import Event, Request

if TYPE_CHECKING:
    from cluster.routing.told import Told


@dataclass(frozen=True)
class ServedModel:
    """What `/v1/models` tells. `fingerprint` is hex; it is `system_fingerprint` in responses."""

    name: str
    created: int
    max_model_len: int
    fingerprint: str


@dataclass(frozen=True)
class WorkerView:
    """One live worker as the directory shows it."""

    worker_id: str
    role: str
    address: str
    pid: int
    running: int
    queued: int
    queued_tokens: int
    capacity_bytes: int
    used_bytes: int
    draining: bool
    fingerprint: bytes
    max_model_len: int
    bytes_per_token: float
    metrics: dict[str, float]


@dataclass(frozen=True)
class Readiness:
    """`ready` only if a prefill and a decode worker and the store answer; `reason` names what is
    missing.
    """

    ready: bool
    reason: str = ""


class Service(Protocol):
    """Serves requests. Lives in the front process; torch-free."""

    async def model(self) -> ServedModel:
        """Raises `WorkerUnavailableError` while no worker has registered."""

    def generate(self, request: Request) -> AsyncIterator[Event]:
        """Progress..., TokenChunk..., Finish. Raises a `PenstockError` if the request fails.

        Closing the iterator cancels the request: everything it holds is freed within 2 s.
        """

    async def readiness(self) -> Readiness: ...

    async def workers(self) -> list[WorkerView]:
        """For `/metrics`: live workers with their counters."""

    async def route_told(self, request_id: str, *, tenant: bytes) -> Told | None:
        """How a request of the last ones was routed, and why; None if it is not remembered here, or
        is another tenant's.
        """

    async def store_stat(self) -> dict[str, float]:
        """For `/metrics`: the store node's gauges and counters; {} if it cannot be reached."""

    async def expositions(self) -> list[bytes | None]:
        """For `/metrics`: what each worker and the store node tell about themselves, in Prometheus'
        text format; None for one that does not answer in time.
        """

    async def close(self) -> None: ...


@dataclass(frozen=True)
class Endpoint:
    """A running cluster as its user sees it."""

    url: str
    store_address: str
    peers: Peers = field(default=ALONE, repr=False)
    """How to call the store and the workers; holds the cluster's token."""


class Launcher(Protocol):
    """Starts and stops the cluster's processes. `stop` may be called twice and after a failed
    `start`.

    After `stop`, after a signal and after a crash of the launching process no process, port or
    shared memory is left.
    """

    def start(self) -> Endpoint:
        """Blocks until the cluster is ready. Raises a `PenstockError` that names the part that
        failed.
        """

    def wait(self) -> None:
        """Blocks until a part that cannot be restarted has died; raises what happened."""

    def rollout(self) -> None:
        """Ask for fresh workers in place of all, without a failed request; returns at once."""

    def stop(self) -> None: ...
