"""A stage's calls for several sessions in one: what waits while it works goes into its next call. asyncio; no Ray.

For motion and decode, which keep nothing of a session. `cluster.member` has one of these for each of them; the denoise
stage, whose sessions have windows and an order, has `cluster.engine` instead.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.batching import bucket
from cluster.threads import StageThread


@dataclass(frozen=True)
class Done:
    """A result, and what its call cost."""

    result: Any
    work_ms: float
    wait_ms: float


@dataclass(frozen=True)
class Item:
    """One session's part of a call, and who waits for it."""

    args: tuple[Any, ...]
    due_s: float
    submitted_s: float
    done: asyncio.Future[Done]


class Batcher:
    """`run` takes one list per argument, an entry per session, and returns as many results.

    `record` is told of each call: its work in ms, how long each of its sessions waited, and how many still wait.
    """

    def __init__(
        self,
        run: Callable[..., Sequence[Any]],
        thread: StageThread,
        max_batch: int,
        record: Callable[[float, Sequence[float], int], None] = lambda work_ms, waits_ms, num_waiting: None,
    ):
        self.run, self.thread, self.max_batch, self.record = run, thread, max_batch, record
        self.waiting: list[Item] = []
        self.working: asyncio.Task[None] | None = None

    async def submit(self, due_s: float, *args: Any) -> Done:
        """One session's result. Raises what the stage raises for this session alone."""
        done: asyncio.Future[Done] = asyncio.get_running_loop().create_future()
        self.waiting.append(Item(args, due_s, time.perf_counter(), done))
        if self.working is None or self.working.done():
            self.working = asyncio.create_task(self._work())
        return await done

    async def _work(self) -> None:
        """Until nothing waits: the earliest deadlines first, as many at once as there are and may be."""
        while self.waiting:
            self.waiting.sort(key=lambda item: item.due_s)
            num = bucket(len(self.waiting), self.max_batch)
            batch, self.waiting = self.waiting[:num], self.waiting[num:]
            started_s = time.perf_counter()
            outcomes, work_ms = await call_each(self.thread, self.run, [item.args for item in batch])
            waits_ms = [(started_s - item.submitted_s) * 1e3 for item in batch]
            self.record(work_ms, waits_ms, len(self.waiting))
            for item, outcome, wait_ms in zip(batch, outcomes, waits_ms, strict=True):
                if item.done.done():
                    continue
                if isinstance(outcome, Exception):
                    item.done.set_exception(outcome)
                else:
                    item.done.set_result(Done(outcome, work_ms, wait_ms))


async def call_each(
    thread: StageThread, run: Callable[..., Sequence[Any]], args: Sequence[tuple[Any, ...]]
) -> tuple[list[Any], float]:
    """One call for several sessions, each with its arguments: per session its result or its own error, and the ms.

    Stages change nothing that they are given, so a call that fails is made again for each session alone.
    """
    try:
        results, ms = await thread.call(len(args), run, *(list(column) for column in zip(*args, strict=True)))
        return list(results), ms
    except Exception as error:
        if len(args) == 1:
            return [error], 0.0
    alone = [await call_each(thread, run, [one]) for one in args]
    return [results[0] for results, _ in alone], sum(ms for _, ms in alone)
