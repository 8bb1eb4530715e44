"""Start a cluster, run it until it is told to stop, leave nothing behind."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from cluster.config import ClusterConfig
from cluster.contracts import Endpoint, Launcher


def launcher_for(
    config: ClusterConfig, again: Callable[[], ClusterConfig] | None = None
) -> Launcher:
    """`again` reads the configuration anew, for a rollout."""
    if config.launcher.kind == "local":
        from cluster.launchers.local import LocalLauncher

        return LocalLauncher(config, again=again)
    from cluster.launchers.ray import RayLauncher

    return RayLauncher(config)


@contextlib.contextmanager
def started(config: ClusterConfig) -> Iterator[Endpoint]:
    """A ready cluster for the length of the block, stopped also after an error or Ctrl-C."""
    launcher = launcher_for(config)
    try:
        yield launcher.start()
    finally:
        launcher.stop()


class _Signalled(BaseException):
    """SIGTERM or SIGINT, raised where the main thread waits."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def run(config: ClusterConfig, again: Callable[[], ClusterConfig] | None = None) -> int:
    """What `penstock serve` does: prints `ready URL`, serves until a signal. Exit code. SIGHUP asks
    for a rollout (`penstock rollout`).
    """

    def handle_with(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, handler)

    def on_signal(number: int, frame: FrameType | None) -> None:
        handle_with(signal.SIG_IGN)
        raise _Signalled(number)

    handle_with(on_signal)
    launcher = launcher_for(config, again)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGHUP, lambda number, frame: launcher.rollout())
    try:
        endpoint = launcher.start()
        print(f"ready {endpoint.url}", flush=True)
        launcher.wait()
    except _Signalled:
        return 0
    finally:
        # No signal may interrupt the clean-up, whether a signal or a failure began it.
        handle_with(signal.SIG_IGN)
        launcher.stop()
    return 0
