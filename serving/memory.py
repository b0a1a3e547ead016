"""Keeps a replica small after large messages. Called by `serving.application`, and by `serving.session` at its end.

A client that floods for a moment would otherwise leave a replica large for ever: Serve's queue of unread messages hangs
in a reference cycle until Python happens to look for one, glibc learns from large buffers to keep what they leave, and
the pages of Ray's object store that its messages came through stay mapped.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import sys
import time
from collections.abc import Callable, Iterator

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Names of glibc's `mallopt`."""
MADV_DONTNEED = 4
OBJECT_STORE = "/plasma"
"""In the name of its mappings."""
LARGE_BYTES = 2**20
"""Buffers from this size on get pages of their own, which go back to the system when they are freed."""
DELAY_S = 1.0
"""One look for cycles does for all sessions that end within it."""

_due_s = float("-inf")


def prepare_process() -> None:
    """Once, at the start of a replica. Without glibc the allocator is left as it is."""
    # What lives as long as the process need not be looked through for cycles: 85 ms each time become less than 1 ms.
    gc.collect()
    gc.freeze()
    mallopt = _libc("mallopt")
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGE_BYTES)
        mallopt(M_TRIM_THRESHOLD, LARGE_BYTES)


def release_soon() -> None:
    """Gives back what ended sessions have left, in a second."""
    global _due_s
    now_s = time.monotonic()
    if now_s >= _due_s:
        _due_s = now_s + DELAY_S
        asyncio.get_running_loop().call_later(DELAY_S, _release)


def _release() -> None:
    gc.collect()
    madvise = _libc("madvise")
    if madvise is None:
        return
    for start, size in _object_store_mappings():
        # The pages are shared: their contents stay in the store, and come back into this process when they are read.
        madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), MADV_DONTNEED)


def _object_store_mappings() -> Iterator[tuple[int, int]]:
    with contextlib.suppress(OSError), open("/proc/self/maps") as maps:
        for line in maps:
            span, access, *_, name = line.split(maxsplit=5)
            if OBJECT_STORE in name and access.endswith("s"):
                start, end = (int(address, 16) for address in span.split("-"))
                yield start, end - start


def _libc(function: str) -> Callable[..., int] | None:
    """A function of the C library that only Linux, or only glibc, has."""
    return getattr(ctypes.CDLL(None), function, None) if sys.platform == "linux" else None
