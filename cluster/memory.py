"""Keeps a long-lived process as small as its work. Used by the members and, in `serving`, by the ingress replicas.

What a burst leaves behind would otherwise stay: Serve's queue of unread messages hangs in a reference cycle until
Python happens to look for one, glibc keeps what buffers leave, and the pages of Ray's object store that messages came
through stay mapped. No Ray, no torch.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import sys
from collections.abc import Callable, Iterator

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Names of glibc's `mallopt`."""
MADV_DONTNEED = 4
OBJECT_STORE = "/plasma"
"""In the name of its mappings."""
LARGE_BYTES = 2**20
"""A replica's buffers from this size on get pages of their own, which go back to the system when they are freed."""
DELAY_S = 1.0


class Releaser:
    """Calls `release` in the event loop, a moment after it is asked to."""

    def __init__(self, delay_s: float = DELAY_S):
        self._delay_s = delay_s
        self._timer: asyncio.TimerHandle | None = None

    def soon(self) -> None:
        """Once for all who ask within the moment."""
        if self._timer is None:
            self._start()

    def when_idle(self) -> None:
        """A moment after the last time it was asked: never in the middle of work."""
        if self._timer is not None:
            self._timer.cancel()
        self._start()

    def _start(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._delay_s, self._release)

    def _release(self) -> None:
        self._timer = None
        release()


def freeze() -> None:
    """What lives as long as the process need not be looked through for cycles again: 85 ms become less than 1 ms."""
    gc.collect()
    gc.freeze()


def keep_large_buffers_apart() -> None:
    """For processes whose large buffers are few and short-lived. Without glibc the allocator is left as it is."""
    mallopt = _libc("mallopt")
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGE_BYTES)
        mallopt(M_TRIM_THRESHOLD, LARGE_BYTES)


def release() -> None:
    """Gives the system back what is no longer used."""
    gc.collect()
    trim, madvise = _libc("malloc_trim"), _libc("madvise")
    if trim is not None:
        trim(ctypes.c_size_t(0))
    if madvise is not None:
        for start, size in _object_store_mappings():
            # The pages are shared: their contents stay in the store, and come back here when they are read again.
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
