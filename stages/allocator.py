"""What the C library does with memory that the networks have freed. Called once per process, by `stages.pipeline`.

By default glibc gives most of it back to the system at once and, for the next layer, asks for it again page by page: a
quarter of a small model's time. No torch.
"""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
"""Names of glibc's `mallopt`."""
OWN_MAPPING_BYTES = 32 * 2**20
"""Buffers from this size on get pages of their own, which go back when they are freed; the most that glibc takes."""
KEPT_BYTES = 64 * 2**20
"""So much freed memory stays with the process until somebody trims it, as idle members do (`cluster.memory`)."""


def keep_freed_memory() -> None:
    """For this process, from now on. Without glibc the allocator is left as it is."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, OWN_MAPPING_BYTES)
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
        # Otherwise every thread that runs a network keeps as much again, in a heap of its own.
        mallopt(M_ARENA_MAX, 1)
