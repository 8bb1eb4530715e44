"""Keeps memory that buffers leave, so that the next buffer need not take it from the system again.

A message of a megabyte is a buffer that comes and goes. Left to itself glibc's allocator gives such
memory back and takes it again, zeroed page by page: half the time of a transfer.
"""

from __future__ import annotations

import ctypes
import sys

KEPT_BYTES = 64 << 20
"""Most free memory that stays with the process."""
_MMAP_THRESHOLD_BYTES = 32 << 20
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> bool:
    """For the whole process; may be called again. False where the C library has no such setting."""
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    mmap_kept = mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD_BYTES)
    return bool(mmap_kept and mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES))
