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

_POLL_S = 0.2
# Ray and Serve take their time to notice, and Serve gives requests the whole timeout.
_SPARE_S = 15.0


def main(arguments: Sequence[str] | None = None) -> int:
    """0: nothing runs here any more. 1: something still did at the end of the timeout."""
    parser = argparse.ArgumentParser(prog="python -m cluster.drain", description=__doc__)
    parser.add_argument("--timeout", type=float, default=30.0, metavar="SECONDS")
    parser.add_argument(
        "--ready-file", type=Path, required=True, metavar="FILE", help="launcher.ready_file"
    )
    options = parser.parse_args(arguments)
    node_id = running(options.ready_file)
    if node_id is None:
        print("nothing runs here")
        return 0
    started = time.monotonic()
    refused = _leave(node_id, options.timeout)
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


def running(ready_file: Path) -> str | None:
    """The Ray node of the replica that the file names, if that lives."""
    try:
        pid, node_id = ready_file.read_text().split()
        os.kill(int(pid), 0)
    except (OSError, ValueError):
        return None
    return node_id


def _leave(node_id: str, timeout_s: float) -> str:
    """Announces to Ray that the node leaves; what went wrong, or ''."""
    import ray
    from ray.core.generated import autoscaler_pb2

    # What `ray drain-node` does; neither has stubs.
    raylet: Any = ray._raylet
    reasons: Any = autoscaler_pb2
    try:
        # KubeRay sets it in every Ray container.
        client = raylet.GcsClient(address=os.environ["RAY_ADDRESS"])
        accepted, reason = client.drain_node(
            node_id,
            reasons.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"),
            "the pod is being deleted",
            # Serve stops a replica, gently, its own grace before this moment.
            time.time_ns() // 1_000_000 + int(timeout_s * 1000),
        )
    except KeyError:
        return "RAY_ADDRESS is not set: this runs inside a Ray pod"
    except (ray.exceptions.RayError, RuntimeError, ValueError, OSError) as error:
        return str(error).splitlines()[0]
    return "" if accepted else str(reason)


if __name__ == "__main__":
    raise SystemExit(main())
