"""The denoise member's loop over its sessions' windows: decide, run, absorb. asyncio; no Ray, no torch.

`cluster.member` gives it the denoise stage, the thread that the stage runs in, and for each session the way to its
reference stage. Every state is a value, so a failed call leaves all windows as they were: each of its sessions is then
run alone, and only the one that fails again is closed. With every chunk goes a snapshot of its session, from which the
session can be opened anew on any member.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from cluster.batcher import call_each
from cluster.batching import Pending, Progress, check_number, next_batch
from cluster.errors import MemberLost, PoolFull, SessionClosed, SessionMoved
from cluster.messages import SessionKey, SessionRecord, SessionSnapshot
from cluster.threads import StageThread
from stages.messages import CleanChunk, Keyframe, MotionChunk, MotionState, ReferenceFeatures

MAX_SESSIONS = 64
"""Windows that one member keeps: a bound for memory, far above what it can serve live."""

EncodeKeyframe = Callable[[Keyframe], Awaitable[ReferenceFeatures]]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Done:
    """A chunk that has left the window, its session as it then is, and what its call cost."""

    clean: CleanChunk
    snapshot: SessionSnapshot
    work_ms: float
    wait_ms: float


@dataclass(frozen=True)
class Job:
    """A chunk that waits, and who waits for it."""

    pending: Pending
    chunk: MotionChunk
    motion: MotionState
    """After this chunk."""
    submitted_s: float
    done: asyncio.Future[Done]


@dataclass
class Hosted:
    """A session on this member."""

    record: SessionRecord
    state: Any
    """The WindowState, opaque here."""
    motion: MotionState
    """After the last chunk that went through the window."""
    encode_keyframe: EncodeKeyframe
    progress: Progress
    jobs: dict[int, Job] = field(default_factory=dict)
    """Waiting chunks by number."""

    @property
    def key(self) -> SessionKey:
        return self.record.key


class Engine:
    """The sessions of one denoise member. `record` as in `cluster.batcher.Batcher`."""

    def __init__(
        self,
        stage: Any,
        thread: StageThread,
        max_batch: int,
        record: Callable[[float, Sequence[float], int], None] = lambda work_ms, waits_ms, num_waiting: None,
    ):
        self.stage, self.thread, self.max_batch, self.record = stage, thread, max_batch, record
        self.sessions: dict[SessionKey, Hosted] = {}
        self.wake = asyncio.Event()
        self.tasks: set[asyncio.Task[None]] = set()

    def open(self, record: SessionRecord, state: Any, motion: MotionState, encode_keyframe: EncodeKeyframe) -> None:
        """Takes a session in; an earlier life of it (a smaller epoch) ends.

        Raises PoolFull, and SessionMoved where a later life of it is here.
        """
        session, epoch = record.key
        if any(other == session and later > epoch for other, later in self.sessions):
            raise SessionMoved("the session was opened again on another connection")
        self.close(session, SessionMoved("the session was opened again"))
        if len(self.sessions) >= MAX_SESSIONS:
            raise PoolFull(f"this member holds {MAX_SESSIONS} sessions; try again when one has ended")
        # One call for each chunk, so the next chunk's number is that of the calls so far.
        progress = Progress(next_number=state.num_calls)
        self.sessions[record.key] = Hosted(record, state, motion, encode_keyframe, progress)

    async def release(self, session: str) -> SessionSnapshot:
        """Forgets a session and returns how far it was. Raises MemberLost if it is not here."""
        hosted = next((hosted for key, hosted in self.sessions.items() if key[0] == session), None)
        if hosted is None:
            raise MemberLost("the session is not here: the member was restarted, or it was closed; open a new session")
        self.close(session, SessionMoved("the session goes on on another connection"))
        return SessionSnapshot(await self.thread.run(self.stage.snapshot, hosted.state), hosted.motion)

    def close(self, session: str, why: Exception, last_epoch: int | None = None) -> None:
        """Forgets a session, if it is here and its epoch not above `last_epoch`; its waiting chunks fail with `why`."""
        for key in [key for key in self.sessions if key[0] == session]:
            if last_epoch is None or key[1] <= last_epoch:
                for job in self.sessions.pop(key).jobs.values():
                    _fail(job, why)

    def records(self) -> list[SessionRecord]:
        """The sessions that live here."""
        return [hosted.record for hosted in self.sessions.values()]

    async def submit(self, key: SessionKey, number: int, chunk: MotionChunk, motion: MotionState, due_s: float) -> Done:
        """One chunk through its session's window, when its turn has come; `motion`: the motion stage's state after it.

        Raises MemberLost for an unknown session, SessionMoved for an earlier life, and what `check_number` raises.
        """
        hosted = self.sessions.get(key)
        if hosted is None:
            if any(session == key[0] and epoch > key[1] for session, epoch in self.sessions):
                raise SessionMoved("the session was opened again")
            raise MemberLost("the session is not here: the member was restarted, or it was closed; open a new session")
        check_number(number, hosted.progress, hosted.jobs)
        done: asyncio.Future[Done] = asyncio.get_running_loop().create_future()
        hosted.jobs[number] = Job(Pending(key, number, due_s), chunk, motion, time.perf_counter(), done)
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
            parts = [(hosted.state, job.chunk) for hosted, job in batch]
            outcomes, work_ms = await call_each(self.thread, self._step, parts)
            waits_ms = [(start_s - job.submitted_s) * 1e3 for _, job in batch]
            self.record(work_ms, waits_ms, sum(len(hosted.jobs) for hosted in self.sessions.values()))
            for (hosted, job), outcome, wait_ms in zip(batch, outcomes, waits_ms, strict=True):
                self._absorb(hosted, job, outcome, work_ms, wait_ms)

    def _step(self, states: list[Any], chunks: list[MotionChunk]) -> list[tuple[Any, CleanChunk, Keyframe | None, Any]]:
        """One denoiser call, and a snapshot of every window after it. In the stage's thread."""
        results = self.stage.run(states, chunks)
        return [(*result, self.stage.snapshot(result[0])) for result in results]

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

    def _absorb(self, hosted: Hosted, job: Job, outcome: Any, work_ms: float, wait_ms: float) -> None:
        """Hands a result to its session, which may have been closed meanwhile."""
        if isinstance(outcome, Exception):
            logger.error("the denoiser's call for one session failed", exc_info=outcome)
            _fail(job, outcome)
            self.close(hosted.key[0], outcome, hosted.key[1])
            return
        if self.sessions.get(hosted.key) is not hosted:
            _fail(job, SessionClosed("the session was closed"))
            return
        hosted.state, clean, keyframe, window = outcome
        hosted.motion = job.motion
        if keyframe is not None:
            hosted.progress = replace(hosted.progress, awaits_keyframe=True)
            task = asyncio.create_task(self._add_keyframe(hosted, keyframe))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)
        if not job.done.done():
            job.done.set_result(Done(clean, SessionSnapshot(window, job.motion), work_ms, wait_ms))

    async def _add_keyframe(self, hosted: Hosted, keyframe: Keyframe) -> None:
        """The session sits out until the reference stage has encoded its keyframe."""
        try:
            features = await hosted.encode_keyframe(keyframe)
            hosted.state = await self.thread.run(self.stage.add_keyframe, hosted.state, features)
        except Exception as error:
            self.close(hosted.key[0], error, hosted.key[1])
        hosted.progress = replace(hosted.progress, awaits_keyframe=False)
        self.wake.set()


def _fail(job: Job, error: Exception) -> None:
    if not job.done.done():
        job.done.set_exception(error)
