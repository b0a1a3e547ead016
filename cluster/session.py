"""A connection to the pool, and one person's stream through its members. asyncio; used by every ingress replica.

A chunk visits motion, denoise and decode. Their calls are submitted together, each taking the result of the one before
by reference: nothing is awaited in between, and no chunk comes back here before it is decoded.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import Coroutine
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayActorError, RayError

from cluster.errors import BadChunk, MemberLost, PoolFailed, SessionClosed
from cluster.messages import DecodedChunk, Route
from cluster.placement import Node, plan_pool
from cluster.pool import NAMESPACE, PoolManager
from cluster.settings import PoolSettings, absolute, pool_name
from cluster.unwrap import to_user_error
from stages.config import ModelConfig
from stages.errors import BadPortrait, UserError
from stages.messages import Pixels

__all__ = ["DecodedChunk", "Pool", "Session"]

MANAGER_S = 60.0
"""How long a manager may fail to answer: Ray needs a few seconds to restart one."""
REOPEN_S = 60.0
"""How long opening a session is tried again when members die meanwhile; a member's restart loads its weights."""
RETRY_S = 0.2
MAX_OPENINGS = 8
"""Of one replica at a time, those counted that nobody waits for any more: clients that leave at once must not queue up
work before the others'."""


class Pool:
    """One ingress replica's connection to the pool: holds its lease. Made by `connect`."""

    config: ModelConfig
    """Of the loaded weights."""

    def __init__(self, settings: PoolSettings):
        self.settings = absolute(settings)
        self.lease = uuid.uuid4().hex
        self.failed: UserError | None = None
        """Why no session can be opened at present; None while all is well. Looked up with every renewal."""
        self._manager: Any = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._openings = asyncio.Semaphore(MAX_OPENINGS)
        self._renewing = self._start(self._renew())

    @classmethod
    async def connect(cls, settings: PoolSettings) -> Pool:
        """Joins the pool of these settings, makes it if there is none, and waits until its members are loaded.

        Raises PoolFailed with the reason when it cannot be placed or its weights do not load.
        """
        pool = cls(settings)
        try:
            pool.config = await pool._ask("join", pool.lease)
            pool.failed = None
        except BaseException:
            pool._renewing.cancel()
            raise
        return pool

    async def open(self, portrait: Pixels, seed: int) -> Session:
        """A new session for a portrait, uint8 (s, s, 3) with s = config.size_px. `seed` decides all of its noise.

        Raises BadPortrait, PoolFull, PoolFailed.
        """
        _check_portrait(portrait, self.config)
        session = uuid.uuid4().hex
        await self._openings.acquire()
        seating = self._start(self._seat(session, ray.put(portrait), seed))
        seating.add_done_callback(lambda _: self._openings.release())
        try:
            return await asyncio.shield(seating)
        except BaseException:
            self._start(self._unseat(session, seating))
            raise

    async def close(self) -> None:
        """Gives the lease back; sessions that are still open are closed. The pool stays for `lease_s` more."""
        self._renewing.cancel()
        with contextlib.suppress(UserError):
            await self._ask("leave", self.lease, create=False)

    async def _seat(self, session: str, portrait: ray.ObjectRef, seed: int) -> Session:
        """Opens the session on the members that the manager names; again on others when one dies meanwhile."""
        deadline_s = time.monotonic() + REOPEN_S
        while True:
            route: Route = await self._ask("open", session, self.lease)
            motion = route.motion.open_motion.remote(portrait)
            features = route.reference.open_reference.remote(portrait)
            key = (session, route.epoch)
            try:
                await route.denoise.open_session.remote(key, self.lease, features, motion, seed)
                return Session(self, session, route, motion)
            except RayError as error:
                cause = to_user_error(error)
                if not isinstance(cause, MemberLost) or time.monotonic() > deadline_s:
                    raise cause from None

    async def _unseat(self, session: str, seating: asyncio.Task[Session]) -> None:
        """Closes a session that nobody waits for, once its opening has ended: before, nothing is there to close."""
        await asyncio.gather(seating, return_exceptions=True)
        await self._close(session)

    async def _close(self, session: str) -> None:
        with contextlib.suppress(UserError):
            await self._ask("close", session, create=False)

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(self.settings.lease_s / 4)
            try:
                is_loaded = await self._ask("renew", self.lease)
                self.failed = None if is_loaded else PoolFailed("the pool is being loaded again")
            except UserError as error:
                self.failed = error

    async def _ask(self, method: str, *args: Any, create: bool = True) -> Any:
        """One call to the manager, again while it restarts. Where it has gone for good, a new one is made, or nobody
        needs to be asked any more."""
        deadline_s = time.monotonic() + MANAGER_S
        while True:
            try:
                self._manager = self._manager or await asyncio.to_thread(_manager, self.settings)
                return await getattr(self._manager, method).remote(*args)
            except ActorDiedError:
                self._manager = None
                if not create:
                    return None
            except RayActorError:
                if time.monotonic() > deadline_s:
                    raise PoolFailed("the pool's manager does not answer; see Ray's logs") from None
            except RayError as error:
                raise to_user_error(error) from None
            await asyncio.sleep(RETRY_S)

    def _start(self, coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


class Session:
    """One person's stream. Made by `Pool.open`; the first error ends it, and every later call raises that error."""

    def __init__(self, pool: Pool, session: str, route: Route, motion: ray.ObjectRef):
        self.id = session
        self._pool, self._route, self._motion = pool, route, motion
        self._num_chunks = 0
        self._in_order = asyncio.Lock()
        self._failure: UserError | None = None

    async def run(self, frames: Pixels) -> DecodedChunk:
        """One chunk of driving frames, uint8 (chunk_frames, s, s, 3). Several calls may be in flight: the order of the
        calls is that of the chunks, and of the results.

        Raises BadChunk (the session goes on), MemberLost when a member died, and whatever a stage raised.
        """
        _check_frames(frames, self._pool.config)
        if self._failure:
            raise self._failure
        decoded = asyncio.wrap_future(self._submit(frames).future())
        # Where nobody waits any more for a chunk, its error has been seen all the same, and Ray need not log it.
        decoded.add_done_callback(lambda future: future.cancelled() or future.exception())
        async with self._in_order:
            try:
                return await asyncio.shield(decoded)
            except RayError as error:
                raise self._fail(to_user_error(error)) from None

    async def close(self) -> None:
        """Ends the session on its members. Chunks in flight fail with SessionClosed."""
        self._failure = self._failure or SessionClosed("the session was closed")
        await self._pool._close(self.id)

    def _submit(self, frames: Pixels) -> ray.ObjectRef:
        """Sends the chunk on its way through all three members."""
        number, route = self._num_chunks, self._route
        self._num_chunks += 1
        self._motion, moved = route.motion.motion.remote(self._motion, frames)
        clean = route.denoise.denoise.remote((self.id, route.epoch), number, moved)
        return route.decode.decode.remote(clean)

    def _fail(self, error: UserError) -> UserError:
        """The error that ended the session: the first one."""
        if self._failure is None:
            self._failure = error
            self._pool._start(self._pool._close(self.id))
        return self._failure


def _manager(settings: PoolSettings) -> Any:
    """The handle of the pool's manager, which is created if there is none. Blocks; raises PoolFailed."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    plan = plan_pool([Node(node.get("CPU", 0.0), int(node.get("GPU", 0))) for node in nodes], settings)
    name = pool_name(settings)
    actor = ray.remote(PoolManager).options(
        name=name, namespace=NAMESPACE, lifetime="detached", get_if_exists=True, max_restarts=-1, num_cpus=0
    )
    return actor.remote(name, settings, plan)


def _check_portrait(portrait: Pixels, config: ModelConfig) -> None:
    shape = (config.size_px, config.size_px, 3)
    if portrait.shape != shape or portrait.dtype != "uint8":
        raise BadPortrait(f"the portrait must be uint8 {shape}, not {portrait.dtype} {portrait.shape}")


def _check_frames(frames: Pixels, config: ModelConfig) -> None:
    shape = (config.window.chunk_frames, config.size_px, config.size_px, 3)
    if frames.shape != shape or frames.dtype != "uint8":
        raise BadChunk(f"a chunk must be uint8 {shape}, not {frames.dtype} {frames.shape}")
