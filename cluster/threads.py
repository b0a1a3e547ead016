"""The one thread in which a stage works, so that its member goes on answering. Used by `cluster.member` and the engine.

One thread per stage: calls of a stage keep their order, and on a GPU the stages of one member overlap.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


class StageThread:
    """Runs functions one after another, in the order of the calls."""

    def __init__(self, name: str):
        self.executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)

    async def run(self, function: Callable[..., T], *args: Any) -> T:
        """Waits for the function's result; raises what it raises."""
        return await asyncio.get_running_loop().run_in_executor(self.executor, function, *args)
