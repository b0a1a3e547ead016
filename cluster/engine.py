"""The denoise member's loop over its sessions' windows: decide, run, absorb. asyncio; no Ray, no torch.

`cluster.member` gives it the denoise stage, the thread that the stage runs in, and the way to the reference stage.
Every state is a value, so a failed call leaves all windows as they were: each of its sessions is then run alone, and
only the one that fails again is closed.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Any

from cluster.batching import Pending, Progress, check_number, next_batch
from cluster.errors import MemberLost, PoolFull, SessionClosed
from cluster.messages import SessionKey, SessionRecord
from cluster.threads import StageThread
from stages.messages import CleanChunk, Keyframe, MotionChunk, ReferenceFeatures

MAX_SESSIONS = 64
"""Windows that one member keeps: a bound for memory, far above what it can serve live."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Done:
    """A chunk that has left the window, and what its call cost."""

    clean: CleanChunk
    work_ms: float
    wait_ms: float


@dataclass(frozen=True)
class Job:
    """A chunk that waits, and who waits for it."""

    pending: Pending
    chunk: MotionChunk
    done: asyncio.Future[Done]


@dataclass
class Hosted:
    """A session on this member."""

    key: SessionKey
    lease: str
    state: Any
    """The WindowState, opaque here."""
    progress: Progress = field(default_factory=Progress)
    jobs: dict[int, Job] = field(default_factory=dict)
    """Waiting chunks by number."""


class Engine:
    """The sessions of one denoise member."""

    def __init__(
        self,
        stage: Any,
        thread: StageThread,
        encode_keyframe: Callable[[Keyframe], Awaitable[ReferenceFeatures]],
        max_batch: int,
    ):
        self.stage, self.thread, self.encode_keyframe, self.max_batch = stage, thread, encode_keyframe, max_batch
        self.sessions: dict[SessionKey, Hosted] = {}
        self.wake = asyncio.Event()
        self.tasks: set[asyncio.Task[None]] = set()

    def open(self, key: SessionKey, lease: str, state: Any) -> None:
        """Takes a session in; an earlier life of it (a smaller epoch) ends. Raises PoolFull."""
        self.close(key[0], SessionClosed("the session was opened again"))
        if len(self.sessions) >= MAX_SESSIONS:
            raise PoolFull(f"this member holds {MAX_SESSIONS} sessions; try again when one has ended")
        self.sessions[key] = Hosted(key, lease, state)

    def close(self, session: str, why: Exception) -> None:
        """Forgets a session, if it is here; its waiting chunks fail with `why`."""
        for key in [key for key in self.sessions if key[0] == session]:
            for job in self.sessions.pop(key).jobs.values():
                _fail(job, why)

    def records(self) -> list[SessionRecord]:
        """The sessions that live here."""
        return [SessionRecord(*key, hosted.lease) for key, hosted in self.sessions.items()]

    async def submit(self, key: SessionKey, number: int, chunk: MotionChunk) -> Done:
        """One chunk through its session's window, when its turn has come.

        Raises MemberLost for an unknown session, and what `check_number` raises.
        """
        hosted = self.sessions.get(key)
        if hosted is None:
            raise MemberLost("the session is not here: the member was restarted, or it was closed; open a new session")
        check_number(number, hosted.progress, hosted.jobs)
        done: asyncio.Future[Done] = asyncio.get_running_loop().create_future()
        hosted.jobs[number] = Job(Pending(key, number, time.perf_counter()), chunk, done)
        self.wake.set()
        return await done

    async def run(self) -> None:
        """The loop. Ends only by an error of its own."""
        while True:
            batch = self._decide()
            if not batch:
                self.wake.clear()
                await self.wake.wait()
                continue
            start_s = time.perf_counter()
            outcomes = await self._call([hosted.state for hosted, _ in batch], [job.chunk for _, job in batch])
            work_ms = (time.perf_counter() - start_s) * 1e3
            for (hosted, job), outcome in zip(batch, outcomes, strict=True):
                self._absorb(hosted, job, outcome, work_ms, (start_s - job.pending.due_s) * 1e3)

    def _decide(self) -> list[tuple[Hosted, Job]]:
        """Takes the next call's chunks out of their queues."""
        pending = [job.pending for hosted in self.sessions.values() for job in hosted.jobs.values()]
        progress = {key: hosted.progress for key, hosted in self.sessions.items()}
        batch = []
        for chunk in next_batch(pending, progress, self.max_batch):
            hosted = self.sessions[chunk.session]
            hosted.progress = replace(hosted.progress, next_number=chunk.number + 1)
            batch.append((hosted, hosted.jobs.pop(chunk.number)))
        return batch

    async def _call(self, states: list[Any], chunks: list[MotionChunk]) -> list[Any]:
        """Per session (state, clean chunk, keyframe or None), or the error that is its own."""
        try:
            return await self.thread.run(self.stage.run, states, chunks)
        except Exception as error:
            if len(states) == 1:
                logger.exception("the denoiser's call for one session failed")
                return [error]
            return [(await self._call([s], [c]))[0] for s, c in zip(states, chunks, strict=True)]

    def _absorb(self, hosted: Hosted, job: Job, outcome: Any, work_ms: float, wait_ms: float) -> None:
        """Hands a result to its session, which may have been closed meanwhile."""
        if isinstance(outcome, Exception):
            _fail(job, outcome)
            self.close(hosted.key[0], outcome)
            return
        hosted.state, clean, keyframe = outcome
        if self.sessions.get(hosted.key) is not hosted:
            _fail(job, SessionClosed("the session was closed"))
            return
        if keyframe is not None:
            hosted.progress = replace(hosted.progress, awaits_keyframe=True)
            task = asyncio.create_task(self._add_keyframe(hosted, keyframe))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)
        if not job.done.done():
            job.done.set_result(Done(clean, work_ms, wait_ms))

    async def _add_keyframe(self, hosted: Hosted, keyframe: Keyframe) -> None:
        """The session sits out until the reference stage has encoded its keyframe."""
        try:
            features = await self.encode_keyframe(keyframe)
            hosted.state = await self.thread.run(self.stage.add_keyframe, hosted.state, features)
        except Exception as error:
            self.close(hosted.key[0], error)
        hosted.progress = replace(hosted.progress, awaits_keyframe=False)
        self.wake.set()


def _fail(job: Job, error: Exception) -> None:
    if not job.done.done():
        job.done.set_exception(error)
