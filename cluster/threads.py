"""The one thread in which a stage works, so that its member goes on answering. Used by `cluster.member` and the engine.

One thread per stage: calls of a stage keep their order, and on a GPU the stages of one member overlap. The thread also
knows how long its calls take, by how many sessions are in them: admission is decided by that.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")

LAST = 19
"""In the system's order of who may work first."""
SLOWER, FASTER = 0.1, 0.03
"""Weights of a newer time: what a call takes under load is learned sooner than it is forgotten in a quiet moment."""


class StageThread:
    """Runs functions one after another, in the order of the calls."""

    def __init__(self, name: str):
        self.executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
        self.call_ms: dict[int, float] = {}
        """By the number of sessions in a call."""
        self._num_calls: Counter[int] = Counter()
        self.busy_s = 0.0
        """All the time at work."""
        self._started_s: float | None = None

    @property
    def stuck_s(self) -> float:
        """How long the present call has been running; 0 where there is none."""
        started_s = self._started_s
        return 0.0 if started_s is None else time.perf_counter() - started_s

    async def run(self, function: Callable[..., T], *args: Any) -> T:
        """Waits for the function's result; raises what it raises."""
        return await asyncio.get_running_loop().run_in_executor(self.executor, self._work, function, *args)

    async def call(self, num_sessions: int, function: Callable[..., T], *args: Any) -> tuple[T, float]:
        """As `run`, for so many sessions at once; returns also how many ms it has worked."""

        def timed() -> tuple[T, float]:
            started_s = time.perf_counter()
            return function(*args), (time.perf_counter() - started_s) * 1e3

        result, ms = await self.run(timed)
        self._num_calls[num_sessions] += 1
        # The first call of a size allocates and chooses kernels: it counts only until there is another.
        known_ms = self.call_ms.get(num_sessions) if self._num_calls[num_sessions] > 2 else None
        self.call_ms[num_sessions] = learn(known_ms, ms)
        return result, ms

    def _work(self, function: Callable[..., T], *args: Any) -> T:
        started_s = self._started_s = time.perf_counter()
        try:
            return function(*args)
        finally:
            self._started_s = None
            self.busy_s += time.perf_counter() - started_s


def yield_to_others() -> None:
    """Lets this thread, and not its process, work only when little else wants to; where the system can do that."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LAST)


def learn(known_ms: float | None, ms: float) -> float:
    """The expected time of a call after one more has taken `ms`."""
    if known_ms is None:
        return ms
    return known_ms + (SLOWER if ms > known_ms else FASTER) * (ms - known_ms)
