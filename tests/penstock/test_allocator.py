"""Memory that a message leaves is there for the next one."""

from __future__ import annotations

import platform
import resource

import pytest

from penstock.allocator import keep_freed_memory


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc's allocator")
def test_messages_are_not_taken_from_the_system_again_and_again() -> None:
    def come_and_go(times: int) -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(times):
            messages = [bytes([1]) * (1 << 20) for _ in range(3)]
            del messages
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    assert keep_freed_memory()
    assert keep_freed_memory()
    come_and_go(3)
    # 3 MiB are 768 pages, each time.
    assert come_and_go(20) < 20 * 768 / 4
