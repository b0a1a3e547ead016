"""A member: the one actor class, hosting one or several stages. Created by `cluster.pool`, called by `cluster.session`.

Every call takes and returns messages of numpy arrays, which Ray passes on by reference from member to member. Motion,
reference and decode keep nothing between calls; denoise keeps its sessions' windows in an `Engine`.
Torch is imported only when the weights are loaded, inside the actor.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
import uuid
import warnings
from collections.abc import Callable
from typing import Any

import ray

from cluster.artificial import artificial_stages
from cluster.engine import Engine
from cluster.errors import SessionClosed
from cluster.memory import Releaser, freeze
from cluster.messages import DecodedChunk, SessionKey, SessionRecord, Staged
from cluster.placement import MemberPlan
from cluster.settings import PoolSettings
from cluster.threads import StageThread
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
    """Hosts the stages of its plan. Each stage has one thread; the actor itself never blocks.

    `reference` is the handle of the member that encodes keyframes, None where that is this one.
    """

    def __init__(self, plan: MemberPlan, settings: PoolSettings, reference: Any = None):
        self.plan, self.settings, self.reference = plan, settings, reference
        self.life = uuid.uuid4().hex
        self.threads = {stage: StageThread(stage) for stage in plan.stages}
        self.loading: asyncio.Task[Any] | None = None
        self.engine: Engine | None = None
        self.releaser = Releaser()

    async def hello(self) -> str:
        """Answers as soon as the process is up, with an id of this life of the member."""
        return self.life

    async def ready(self) -> ModelConfig:
        """Waits until the weights are loaded. Raises what loading raises; the next call then loads again."""
        return (await self._stages()).config

    async def open_motion(self, portrait: Pixels) -> MotionState:
        """The session's first motion state. Raises BadPortrait."""
        return (await self._run("motion", "open", portrait))[0]

    @ray.method(num_returns=2)
    async def motion(self, state: MotionState, frames: Pixels) -> tuple[MotionState, Staged[MotionChunk]]:
        """One chunk. The new state is a return value of its own, which the next call can take by reference."""
        [(state, chunk)], stage_ms = await self._run("motion", "run", [state], [frames])
        return state, Staged(chunk, chunk.no_face, stage_ms)

    async def open_reference(self, portrait: Pixels) -> PortraitFeatures:
        """What the denoiser reads of the portrait."""
        return (await self._run("reference", "open", portrait))[0]

    async def keyframe(self, keyframe: Keyframe) -> ReferenceFeatures:
        """What the denoiser reads of a keyframe."""
        return (await self._run("reference", "keyframe", keyframe))[0]

    async def open_session(
        self, key: SessionKey, lease: str, portrait: PortraitFeatures, motion: MotionState, seed: int
    ) -> None:
        """Makes the session's window; it lives here until closed or lost. Raises PoolFull."""
        state, _ = await self._run("denoise", "open", portrait, motion.portrait_tokens, seed)
        (await self._loaded_engine()).open(key, lease, state)

    async def denoise(self, key: SessionKey, number: int, chunk: Staged[MotionChunk]) -> Staged[CleanChunk]:
        """One chunk through the session's window, in the order of its numbers. Raises as `Engine.submit`."""
        done = await (await self._loaded_engine()).submit(key, number, chunk.message)
        self.releaser.when_idle()
        stage_ms = chunk.stage_ms | {"denoise": done.work_ms, "denoise_wait": done.wait_ms}
        return Staged(done.clean, chunk.no_face, stage_ms)

    async def decode(self, chunk: Staged[CleanChunk]) -> DecodedChunk:
        """Latents to pictures."""
        [frames], stage_ms = await self._run("decode", "run", [chunk.message])
        return DecodedChunk(frames, chunk.no_face, chunk.stage_ms | stage_ms)

    async def close_session(self, session: str) -> None:
        """Forgets a session, if it is here."""
        if self.engine:
            self.engine.close(session, SessionClosed("the session was closed"))

    async def sessions(self) -> list[SessionRecord]:
        """The sessions that live here."""
        return self.engine.records() if self.engine else []

    async def _stages(self) -> Any:
        """The loaded stages, loading them on the first call and after a failure."""
        if self.loading is None or (self.loading.done() and self.loading.exception()):
            self.loading = asyncio.create_task(self._load())
        return await asyncio.shield(self.loading)

    async def _load(self) -> Any:
        stages = await next(iter(self.threads.values())).run(load_stages, self.plan, self.settings)
        if "denoise" in self.threads:
            thread = self.threads["denoise"]
            self.engine = Engine(stages.denoise, thread, self._encode_keyframe, self.settings.max_batch)
            asyncio.create_task(self.engine.run()).add_done_callback(_die)
        freeze()
        return stages

    async def _loaded_engine(self) -> Engine:
        await self._stages()
        assert self.engine is not None, f"{self.plan.name} does not host denoise"
        return self.engine

    async def _encode_keyframe(self, keyframe: Keyframe) -> ReferenceFeatures:
        return await (self.reference.keyframe.remote(keyframe) if self.reference else self.keyframe(keyframe))

    async def _run(self, stage: str, method: str, *args: Any) -> tuple[Any, dict[str, float]]:
        """One call in the stage's thread: its result, and its work and wait in ms."""
        function = getattr(getattr(await self._stages(), stage), method)
        submitted_s = time.perf_counter()
        try:
            result, started_s, ended_s = await self.threads[stage].run(_timed, function, *args)
        except UserError:
            raise
        except Exception:
            logger.exception("%s.%s failed", stage, method)
            raise
        finally:
            self.releaser.when_idle()
        return result, {stage: (ended_s - started_s) * 1e3, f"{stage}_wait": (started_s - submitted_s) * 1e3}


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


def _timed(function: Callable[..., Any], *args: Any) -> tuple[Any, float, float]:
    started_s = time.perf_counter()
    result = function(*args)
    return result, started_s, time.perf_counter()


def _die(task: asyncio.Task[None]) -> None:
    """An engine that has stopped would leave its sessions waiting for ever: Ray restarts the member."""
    if not task.cancelled():
        os._exit(1)
