"""A member: the one actor class, hosting one or several stages. Created by `cluster.pool`, called by `cluster.session`.

Every call takes and returns messages of numpy arrays, which Ray passes on by reference from member to member. Motion,
reference and decode keep nothing between calls; denoise keeps its sessions' windows in an `Engine`. Motion, denoise and
decode work for several sessions in one call.
Torch is imported only when the weights are loaded, inside the actor.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import os
import time
import uuid
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import ray

from cluster.artificial import artificial_stages
from cluster.batcher import Batcher, Done
from cluster.engine import EncodeKeyframe, Engine
from cluster.errors import SessionClosed
from cluster.memory import Releaser, freeze
from cluster.messages import DecodedChunk, Life, MemberReport, SessionKey, SessionRecord, SessionSnapshot, Staged
from cluster.metrics import MemberMetrics, on_ray, record_call, rss_mb
from cluster.placement import MemberPlan
from cluster.settings import PoolSettings
from cluster.threads import StageThread, yield_to_others
from stages.config import ModelConfig
from stages.errors import UserError
from stages.messages import (
    CleanChunk,
    Keyframe,
    MotionChunk,
    MotionState,
    Pixels,
    PortraitFeatures,
    ReferenceFeatures,
)

logger = logging.getLogger(__name__)


class Member:
    """Hosts the stages of its plan. Each stage has one thread; the actor itself never blocks."""

    def __init__(self, plan: MemberPlan, settings: PoolSettings):
        self.plan, self.settings = plan, settings
        node = ray.get_runtime_context().get_node_id()
        self.life = Life(uuid.uuid4().hex, os.getpid(), node, time.time())
        self.threads = {stage: StageThread(stage) for stage in plan.stages}
        self.batchers: dict[str, Batcher] = {}
        self.loading: asyncio.Task[Any] | None = None
        self.engine: Engine | None = None
        self.releaser = Releaser()
        self.metrics = on_ray(MemberMetrics)

    async def hello(self) -> Life:
        """Answers as soon as the process is up."""
        return self.life

    async def ready(self) -> ModelConfig:
        """Waits until the weights are loaded. Raises what loading raises; the next call then loads again."""
        return (await self._stages()).config

    async def report(self) -> MemberReport:
        """How this member is."""
        memory_mb = rss_mb()
        self.metrics.member_rss_mb(memory_mb, "+".join(self.plan.stages))
        return MemberReport(
            life=self.life,
            rss_mb=memory_mb,
            busy_s={stage: thread.busy_s for stage, thread in self.threads.items()},
            call_ms={stage: dict(thread.call_ms) for stage, thread in self.threads.items()},
            stuck_s=max(thread.stuck_s for thread in self.threads.values()),
            sessions=tuple(self.engine.records()) if self.engine else (),
        )

    async def open_motion(self, portrait: Pixels) -> MotionState:
        """The session's first motion state. Raises BadPortrait."""
        return await self._run("motion", "open", portrait)

    @ray.method(num_returns=2)
    async def motion(self, state: MotionState, frames: Pixels, due_s: float) -> tuple[MotionState, Staged[MotionChunk]]:
        """One chunk. The new state is a return value of its own, which the next call can take by reference."""
        done = await self._batch("motion", due_s, state, frames)
        state, chunk = done.result
        return state, Staged(chunk, chunk.no_face, _stage_ms("motion", done.work_ms, done.wait_ms))

    async def open_reference(self, portrait: Pixels) -> PortraitFeatures:
        """What the denoiser reads of the portrait."""
        return await self._run("reference", "open", portrait)

    async def keyframe(self, keyframe: Keyframe) -> ReferenceFeatures:
        """What the denoiser reads of a keyframe."""
        return await self._run("reference", "keyframe", keyframe)

    async def open_session(
        self, record: SessionRecord, portrait: PortraitFeatures, motion: MotionState, seed: int, reference: Any
    ) -> None:
        """Makes the session's window; it lives here until closed or lost. `reference` encodes its keyframes.

        Raises PoolFull and SessionMoved.
        """
        state = await self._run("denoise", "open", portrait, motion.portrait_tokens, seed)
        self._loaded_engine().open(record, state, motion, _encoder(reference))

    async def restore_session(
        self, record: SessionRecord, portrait: PortraitFeatures, snapshot: SessionSnapshot, reference: Any
    ) -> None:
        """As `open_session`, for one that goes on from a snapshot."""
        encode = _encoder(reference)
        keyframes = [await encode(keyframe) for keyframe in snapshot.window.keyframes]
        state = await self._run("denoise", "restore", portrait, keyframes, snapshot.window)
        self._loaded_engine().open(record, state, snapshot.motion, encode)

    async def release_session(self, session: str) -> SessionSnapshot:
        """Forgets a session and returns how far it was, for another replica to go on. Raises MemberLost."""
        await self._stages()
        return await self._loaded_engine().release(session)

    @ray.method(num_returns=2)
    async def denoise(
        self, key: SessionKey, number: int, chunk: Staged[MotionChunk], motion: MotionState, due_s: float
    ) -> tuple[Staged[CleanChunk], SessionSnapshot]:
        """One chunk through the session's window, in the order of its numbers. Raises as `Engine.submit`."""
        await self._stages()
        done = await self._loaded_engine().submit(key, number, chunk.message, motion, due_s)
        self.releaser.when_idle()
        stage_ms = chunk.stage_ms | _stage_ms("denoise", done.work_ms, done.wait_ms)
        return Staged(done.clean, chunk.no_face, stage_ms), done.snapshot

    async def decode(self, chunk: Staged[CleanChunk], due_s: float) -> DecodedChunk:
        """Latents to pictures."""
        done = await self._batch("decode", due_s, chunk.message)
        stage_ms = chunk.stage_ms | _stage_ms("decode", done.work_ms, done.wait_ms)
        return DecodedChunk(done.result, chunk.no_face, stage_ms)

    async def close_session(self, session: str, last_epoch: int | None = None) -> None:
        """Forgets a session, if it is here and in no later life than `last_epoch`."""
        if self.engine:
            self.engine.close(session, SessionClosed("the session was closed"), last_epoch)

    async def _stages(self) -> Any:
        """The loaded stages, loading them on the first call and after a failure."""
        if self.loading is None or (self.loading.done() and self.loading.exception()):
            self.loading = asyncio.create_task(self._load())
        return await asyncio.shield(self.loading)

    async def _load(self) -> Any:
        started_s = time.perf_counter()
        # A stand-in is there, and works for the sessions of this member: its start must not be felt.
        has_time = self.settings.spare_members > 0
        with ThreadPoolExecutor(1, "load", yield_to_others if has_time else None) as thread:
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(thread, import_stages, self.settings)
            imported_s = time.perf_counter()
            stages = await loop.run_in_executor(thread, load_stages, self.plan, self.settings)
            loaded_s = time.perf_counter()
        imports_ms, weights_ms = (imported_s - started_s) * 1e3, (loaded_s - imported_s) * 1e3
        self.life = replace(self.life, imports_ms=imports_ms, weights_ms=weights_ms)
        max_batch = self.settings.max_batch
        for stage in {"motion", "decode"} & self.threads.keys():
            run, record = getattr(stages, stage).run, partial(self._record, stage)
            self.batchers[stage] = Batcher(run, self.threads[stage], max_batch, record)
        if "denoise" in self.threads:
            record = partial(self._record, "denoise")
            self.engine = Engine(stages.denoise, self.threads["denoise"], max_batch, record)
            asyncio.create_task(self.engine.run()).add_done_callback(_die)
        freeze()
        return stages

    def _record(self, stage: str, work_ms: float, waits_ms: Sequence[float], num_waiting: int) -> None:
        record_call(self.metrics, stage, work_ms, waits_ms)
        self.metrics.queue_length(num_waiting, stage)

    def _loaded_engine(self) -> Engine:
        assert self.engine is not None, f"{self.plan.name} does not host denoise"
        return self.engine

    async def _batch(self, stage: str, due_s: float, *args: Any) -> Done:
        """One session's part of the stage's next call."""
        await self._stages()
        try:
            return await self.batchers[stage].submit(due_s, *args)
        except UserError:
            raise
        except Exception:
            logger.exception("%s failed", stage)
            raise
        finally:
            self.releaser.when_idle()

    async def _run(self, stage: str, method: str, *args: Any) -> Any:
        """One call in the stage's thread."""
        function = getattr(getattr(await self._stages(), stage), method)
        try:
            return await self.threads[stage].run(function, *args)
        except UserError:
            raise
        except Exception:
            logger.exception("%s.%s failed", stage, method)
            raise
        finally:
            self.releaser.when_idle()


def _encoder(reference: Any) -> EncodeKeyframe:
    """The way to a member's reference stage, given its handle."""

    async def encode(keyframe: Keyframe) -> ReferenceFeatures:
        return await reference.keyframe.remote(keyframe)

    return encode


def _stage_ms(stage: str, work_ms: float, wait_ms: float) -> dict[str, float]:
    return {stage: work_ms, f"{stage}_wait": wait_ms}


def import_stages(settings: PoolSettings) -> None:
    """Torch and all that comes with it: the longer part of a member's start."""
    if not settings.artificial_ms:
        importlib.import_module("stages.pipeline")


def load_stages(plan: MemberPlan, settings: PoolSettings) -> Any:
    """The member's stages, with their weights on its device. Raises BadWeights or BadConfig."""
    if settings.artificial_ms:
        return artificial_stages(settings.artificial_ms)
    from stages import pipeline
    from stages.threads import default_num_threads

    # Messages lie in the object store, read-only and shared with torch without a copy; no stage writes to its input.
    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
    num_threads = plan.num_threads or default_num_threads()
    return pipeline.load_stages(settings.weights, plan.stages, settings.device, num_threads)


def _die(task: asyncio.Task[None]) -> None:
    """An engine that has stopped would leave its sessions waiting for ever: Ray restarts the member."""
    if not task.cancelled():
        os._exit(1)
