"""`python -m cluster.drain`: hands over what this pod's replica is doing before the pod goes.

Tells Ray that this node is about to leave: Serve then sends the replica nothing new, starts
another elsewhere where there is room, and stops this one once its last request has ended.
Kubernetes runs it as `preStop`, inside the pod; the pod's own grace period must be longer than the
timeout.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

READY_FILE = "/tmp/penstock/ready"
_POLL_S = 0.2
# Ray and Serve take their time to notice, and Serve gives requests the whole timeout.
_SPARE_S = 15.0


def main(arguments: Sequence[str] | None = None) -> int:
    """0: nothing runs here any more. 1: something still did at the end of the timeout."""
    parser = argparse.ArgumentParser(prog="python -m cluster.drain", description=__doc__)
    parser.add_argument("--timeout", type=float, default=30.0, metavar="SECONDS")
    parser.add_argument("--ready-file", type=Path, default=Path(READY_FILE))
    options = parser.parse_args(arguments)
    replica = running(options.ready_file)
    if replica is None:
        print("nothing runs here")
        return 0
    started = time.monotonic()
    refused = _leave(options.timeout)
    if refused:
        # Without Ray's help there is still the wait: running requests may end by themselves.
        print(f"drain: {refused}", file=sys.stderr)
    while running(options.ready_file) is not None:
        if time.monotonic() > started + options.timeout + _SPARE_S:
            print(f"drain: still serving after {options.timeout:.0f} s", file=sys.stderr)
            return 1
        time.sleep(_POLL_S)
    print(f"drained in {time.monotonic() - started:.1f} s")
    return 0


def running(ready_file: Path) -> int | None:
    """The process that the file names, if it lives."""
    try:
        pid = int(ready_file.read_text())
        os.kill(pid, 0)
    except (OSError, ValueError):
        return None
    return pid


def _leave(timeout_s: float) -> str:
    """Announces to Ray that this node leaves; what went wrong, or ''."""
    import ray
    from ray.core.generated import autoscaler_pb2

    # What `ray drain-node` does; neither has stubs.
    raylet: Any = ray._raylet
    reasons: Any = autoscaler_pb2
    try:
        # The cluster that runs here, never a new one. KubeRay sets RAY_ADDRESS.
        context: Any = ray.init("auto", log_to_driver=False, configure_logging=False)
        client = raylet.GcsClient(address=context.address_info["gcs_address"])
        accepted, reason = client.drain_node(
            ray.get_runtime_context().get_node_id(),
            reasons.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"),
            "the pod is being deleted",
            # Serve stops a replica, gently, its own grace before this moment.
            time.time_ns() // 1_000_000 + int(timeout_s * 1000),
        )
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        return str(error).splitlines()[0]
    finally:
        ray.shutdown()
    return "" if accepted else str(reason)


if __name__ == "__main__":
    raise SystemExit(main())
