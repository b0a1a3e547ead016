"""Lets one through at a time, and all together take only a share of the time.

Used for openings by `cluster.session`, for portraits by `serving.session`: work that the members and the replica do
beside that for the people who are there already. However many come, and leave, and come again, those lose no more
than this share.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

MAX_PAUSE_S = 2.0
"""One that takes very long costs more than the share, and not everybody's time who comes behind it."""


class Turnstile:
    """`enter`, in the order of arrival; `leave` when what was let in is over."""

    def __init__(self, share: float):
        self._share = share
        self._lock = asyncio.Lock()
        self._entered_s = 0.0
        self._opens_s = float("-inf")

    async def enter(self) -> None:
        """Waits for its turn. Who stops waiting has taken none of it."""
        await self._lock.acquire()
        try:
            await asyncio.sleep(max(self._opens_s - time.monotonic(), 0.0))
        except BaseException:
            self._lock.release()
            raise
        self._entered_s = time.monotonic()

    def leave(self) -> None:
        """The next one may enter, after a pause in proportion to the time since `enter`."""
        now_s = time.monotonic()
        self._opens_s = now_s + min((now_s - self._entered_s) * (1 / self._share - 1), MAX_PAUSE_S)
        self._lock.release()

    @contextlib.asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """From `enter` to `leave`."""
        await self.enter()
        try:
            yield
        finally:
            self.leave()
