"""A connection to the pool, and one person's stream through its members. asyncio; used by every ingress replica.

A chunk visits motion, denoise and decode. Their calls are submitted together, each taking the result of the one before
by reference: nothing is awaited in between, and no chunk comes back here before it is decoded. With it comes a snapshot
of the session, so that a member's death costs nothing but time: the session opens again from its last snapshot, on the
members that live, and its chunks in flight are sent once more. The results are those that would have come anyway.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections import deque
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import ray
from ray.exceptions import ActorDiedError, RayActorError, RayError

from cluster.errors import BadChunk, MemberLost, PoolFailed, SessionClosed, SessionMoved
from cluster.messages import DecodedChunk, Route, SeatRequest, SessionRecord, SessionSnapshot, Waiting
from cluster.placement import Node, plan_pool
from cluster.pool import NAMESPACE, PoolManager
from cluster.settings import PoolSettings, absolute, pool_name
from cluster.turnstile import Turnstile
from cluster.unwrap import to_user_error
from stages.config import ModelConfig
from stages.errors import BadPortrait, UserError
from stages.messages import Pixels

__all__ = ["DecodedChunk", "Listener", "Pool", "Session"]

MANAGER_S = 60.0
"""How long a manager may fail to answer: Ray needs a few seconds to restart one."""
REOPEN_S = 120.0
"""How long a session looks for members when some have died; a member's restart loads its weights."""
RETRY_S = 0.2
RENEW_S = 2.0
"""How often a replica renews its lease and tells how it is, or four times per `lease_s`."""
ASK_AGAIN_S = 1.0
"""How often who waits for a place asks for it."""
OPENING_SHARE = 0.2
"""Of one replica's time: openings are work for the members that serve those who are there already."""
RESUMPTION_SHARE = 0.5
"""The same for those who come back: when a replica has died, all of its sessions at once."""
MAX_PARKED = 64
"""Sessions of one replica whose clients have vanished and may come back."""
PARTS = ("restart", "imports", "weights", "restore", "first_frame")
"""Of an interruption, in their order."""
MAX_TRIES = 5
"""A chunk that so many members die of is not tried again."""


class Listener(Protocol):
    """What the owner of a session is told while it waits."""

    async def queued(self, position: int, estimate_s: float) -> None:
        """All places are taken; `position` counts from 1."""

    async def recovering(self) -> None:
        """A member has died."""

    async def recovered(self, parts_ms: Mapping[str, float]) -> None:
        """The first chunk after it is decoded; `parts_ms` as in `interruption_ms`."""


class Deaf:
    """A listener that nobody gave."""

    async def queued(self, position: int, estimate_s: float) -> None: ...
    async def recovering(self) -> None: ...
    async def recovered(self, parts_ms: Mapping[str, float]) -> None: ...


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
        self._openings, self._resumptions = Turnstile(OPENING_SHARE), Turnstile(RESUMPTION_SHARE)
        self._parked: dict[str, asyncio.TimerHandle] = {}
        self.describe: Callable[[], Mapping[str, Any]] = dict
        """What this replica tells the manager of itself, for the status."""
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

    async def open(
        self, portrait: Pixels, seed: int, session: str | None = None, listener: Listener | None = None
    ) -> Session:
        """A new session for a portrait, uint8 (s, s, 3) with s = config.size_px. `seed` decides all of its noise.

        Waits for a place as long as the line allows. Raises BadPortrait, PoolBusy, PoolFull, PoolFailed.
        """
        _check_portrait(portrait, self.config)
        session, listener = session or uuid.uuid4().hex, listener or Deaf()
        try:
            route = await self.wait_for_place("open", SeatRequest(session, self.lease, time.time()), listener)
        except BaseException:
            self._start(self._close(session))
            raise
        return await self._begin(Session(self, session, ray.put(portrait), seed, listener, route), None)

    async def resume(self, session: str, portrait: Pixels, listener: Listener | None = None) -> Session | None:
        """The session of that id goes on here, wherever its client was connected before. None: nobody knows it.

        Raises as `open`.
        """
        _check_portrait(portrait, self.config)
        listener = listener or Deaf()
        self._unpark(session)
        if await self._ask("epoch", session) is None:
            return None
        try:
            route = await self.wait_for_place("open", SeatRequest(session, self.lease, time.time()), listener)
            snapshot = await self._release(session, route)
        except BaseException:
            self._start(self._close(session))
            raise
        if snapshot is None:
            await self._close(session)
            return None
        return await self._begin(Session(self, session, ray.put(portrait), 0, listener, route), snapshot)

    def park(self, session: str, epoch: int, seconds: float) -> None:
        """Closes a session whose client has vanished, unless it comes back within so many seconds.

        Its place is free for others meanwhile; when it comes back it is the first in line.
        """
        self._start(self._ask("rest", session, epoch))
        while len(self._parked) >= MAX_PARKED:
            oldest = next(iter(self._parked))
            self._unpark(oldest)
            self._start(self._close(oldest, epoch))
        close = lambda: self._start(self._close_parked(session, epoch))  # noqa: E731
        self._parked[session] = asyncio.get_running_loop().call_later(seconds, close)

    async def wait_for_place(self, method: str, request: SeatRequest, listener: Listener) -> Any:
        """Asks the manager until it says something else than to wait; the listener is told how long it takes."""
        told: Waiting | None = None
        while isinstance(answer := await self._ask(method, request), Waiting):
            if told is None or answer.position != told.position:
                await listener.queued(answer.position, answer.estimate_s)
                told = answer
            await asyncio.sleep(ASK_AGAIN_S)
        return answer

    async def status(self) -> Mapping[str, Any]:
        """What the manager knows of the whole pool."""
        await self._ask("renew", self.lease, self.describe())
        return await self._ask("status")

    async def close(self) -> None:
        """Gives the lease back; sessions that are still open may go on elsewhere. The pool stays for `lease_s`."""
        self._renewing.cancel()
        with contextlib.suppress(UserError):
            await self._ask("leave", self.lease, create=False)

    async def _release(self, session: str, route: Route) -> SessionSnapshot | None:
        """How far a session was, taken from the member on which it lived; None where that has lost it."""
        try:
            return await route.previous.release_session.remote(session) if route.previous else None
        except RayError:
            return None

    async def _begin(self, session: Session, snapshot: SessionSnapshot | None) -> Session:
        """Opens a session when it is its turn; when nobody waits for it any more, closes it again."""
        turnstile = self._resumptions if snapshot else self._openings
        try:
            await turnstile.enter()
        except BaseException:
            self._start(self._close(session.id, session.epoch))
            raise
        opening = self._start(session.begin(snapshot))
        opening.add_done_callback(lambda _: turnstile.leave())
        try:
            await asyncio.shield(opening)
        except BaseException:
            self._start(self._abandon(session, opening))
            raise
        return session

    async def _abandon(self, session: Session, opening: asyncio.Task[None]) -> None:
        """Closes a session that nobody waits for, once its opening has ended: before, nothing is there to close."""
        await asyncio.gather(opening, return_exceptions=True)
        await self._close(session.id, session.epoch)

    def _unpark(self, session: str) -> None:
        if timer := self._parked.pop(session, None):
            timer.cancel()

    async def _close_parked(self, session: str, epoch: int) -> None:
        self._unpark(session)
        await self._close(session, epoch)

    async def _close(self, session: str, last_epoch: int | None = None) -> None:
        with contextlib.suppress(UserError):
            await self._ask("close", session, last_epoch, create=False)

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(min(self.settings.lease_s / 4, RENEW_S))
            try:
                is_loaded = await self._ask("renew", self.lease, self.describe())
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


@dataclass
class Chunk:
    """A chunk between its call and its result."""

    number: int
    frames: Pixels
    due_s: float
    result: asyncio.Future[Any] | None = None
    """(DecodedChunk, SessionSnapshot); None while there are no members to ask."""
    num_tries: int = 0


@dataclass(frozen=True)
class Interruption:
    """From a member's death to the next result."""

    detected_s: float
    """On the wall clock, as all here."""
    route: Route
    """The members before it."""
    restored_s: float = 0.0


class Session:
    """One person's stream. Made by `Pool.open`; the first error ends it, and every later call raises that error."""

    def __init__(self, pool: Pool, session: str, portrait: ray.ObjectRef, seed: int, listener: Listener, route: Route):
        self.id = session
        self.num_recoveries = 0
        self._pool, self._portrait, self._seed, self._listener = pool, portrait, seed, listener
        self._route = route
        self._has_members = False
        self._motion: ray.ObjectRef
        self._snapshot: SessionSnapshot | None = None
        self._pending: deque[Chunk] = deque()
        self._next_number = 0
        self._interruption: Interruption | None = None
        self._in_order = asyncio.Lock()
        self._failure: UserError | None = None

    @property
    def epoch(self) -> int:
        """Of its present life."""
        return self._route.epoch

    @property
    def is_recovering(self) -> bool:
        """Whether it is between a member's death and the next result."""
        return self._interruption is not None

    async def begin(self, snapshot: SessionSnapshot | None) -> None:
        """Opens the session on its members, from a snapshot where it goes on. Raises as `Pool.open`."""
        self._snapshot = snapshot
        self._next_number = snapshot.window.num_calls if snapshot else 0
        await self._find_members(self._route)

    async def run(self, frames: Pixels, due_s: float | None = None) -> DecodedChunk:
        """One chunk of driving frames, uint8 (chunk_frames, s, s, 3), due at `due_s` on the wall clock (default now).

        Several calls may be in flight: the order of the calls is that of the chunks, and of the results. A member's
        death makes them take longer. Raises BadChunk (the session goes on), SessionMoved, and whatever a stage raised.
        """
        _check_frames(frames, self._pool.config)
        if self._failure:
            raise self._failure
        chunk = Chunk(self._next_number, frames, time.time() if due_s is None else due_s)
        self._next_number += 1
        self._pending.append(chunk)
        if self._has_members:
            self._submit(chunk)
        async with self._in_order:
            try:
                return await self._result(chunk)
            except UserError as error:
                raise self._fail(error) from None

    async def rest(self) -> None:
        """Gives the place back, while nothing is in flight: `wake` asks for it again."""
        await self._pool._ask("rest", self.id, self.epoch)

    async def wake(self) -> None:
        """Waits for a place after `rest`. Raises PoolBusy."""
        request = SeatRequest(self.id, self._pool.lease, time.time(), self.epoch)
        await self._pool.wait_for_place("wake", request, self._listener)

    def park(self, seconds: float) -> None:
        """The client has vanished: closes the session unless it comes back within so many seconds."""
        self._failure = self._failure or SessionClosed("the session waits for its client")
        self._pool.park(self.id, self.epoch, seconds)

    async def close(self) -> None:
        """Ends the session on its members. Chunks in flight fail with SessionClosed."""
        self._failure = self._failure or SessionClosed("the session was closed")
        await self._pool._close(self.id, self.epoch)

    async def _result(self, chunk: Chunk) -> DecodedChunk:
        """Waits for the oldest chunk; when members die of it or before it, sends it again."""
        while True:
            if self._failure:
                raise self._failure
            assert chunk.result is not None, "sent when it came, or when the members were found"
            try:
                decoded, self._snapshot = await asyncio.shield(chunk.result)
                break
            except RayError as error:
                cause = to_user_error(error)
                chunk.num_tries += 1
                if not isinstance(cause, MemberLost) or chunk.num_tries > MAX_TRIES or self._failure:
                    raise self._failure or cause from None
                await self._recover(cause)
        # Calls that were cancelled have left theirs behind.
        while self._pending and self._pending[0].number <= chunk.number:
            self._pending.popleft()
        if self._interruption is not None:
            parts_ms = interruption_ms(self._interruption, self._route, time.time())
            self._interruption = None
            await self._listener.recovered(parts_ms)
        return decoded

    async def _recover(self, lost: MemberLost) -> None:
        # A member that lives and does not know the session any more may have given it to another replica.
        if lost.actor_id is None and (await self._pool._ask("epoch", self.id) or 0) > self.epoch:
            raise SessionMoved("the session goes on on another connection")
        self._has_members = False
        if self._interruption is None:
            self._interruption = Interruption(time.time(), self._route)
            self.num_recoveries += 1
            await self._listener.recovering()
        # Not a part of the call that found out: when that is cancelled, what was opened still has to be closed.
        await asyncio.shield(self._pool._start(self._find_members(None, lost.actor_id)))
        self._interruption = replace(self._interruption, restored_s=time.time())

    async def _find_members(self, route: Route | None, lost: str | None = None) -> None:
        """Opens the session on the members of the route, or those that the manager names, until some of them live."""
        deadline_s = time.monotonic() + REOPEN_S
        while True:
            if route is None:
                route = await self._pool._ask("open", SeatRequest(self.id, self._pool.lease, 0.0, self.epoch, lost))
            self._route = route
            try:
                await self._open_window(route)
                break
            except RayError as error:
                cause = to_user_error(error)
                if not isinstance(cause, MemberLost) or time.monotonic() > deadline_s:
                    raise cause from None
                route, lost = None, cause.actor_id
        if self._failure:
            await self._pool._close(self.id, self.epoch)
            raise self._failure
        self._has_members = True
        for chunk in self._pending:
            self._submit(chunk)

    async def _open_window(self, route: Route) -> None:
        record, snapshot = SessionRecord(self.id, route.epoch, self._pool.lease, route.names), self._snapshot
        features = route.reference.open_reference.remote(self._portrait)
        if snapshot is None:
            self._motion = route.motion.open_motion.remote(self._portrait)
            opened = route.denoise.open_session.remote(record, features, self._motion, self._seed, route.reference)
        else:
            self._motion = ray.put(snapshot.motion)
            opened = route.denoise.restore_session.remote(record, features, snapshot, route.reference)
        await opened

    def _submit(self, chunk: Chunk) -> None:
        """Sends the chunk on its way through all three members."""
        route, due_s, key = self._route, chunk.due_s, (self.id, self._route.epoch)
        self._motion, moved = route.motion.motion.remote(self._motion, chunk.frames, due_s)
        clean, snapshot = route.denoise.denoise.remote(key, chunk.number, moved, self._motion, due_s)
        decoded = route.decode.decode.remote(clean, due_s)
        chunk.result = asyncio.gather(*(asyncio.wrap_future(ref.future()) for ref in (decoded, snapshot)))
        # Where nobody waits any more for a chunk, its error has been seen all the same, and need not be logged.
        chunk.result.add_done_callback(lambda future: future.cancelled() or future.exception())

    def _fail(self, error: UserError) -> UserError:
        """The error that ended the session: the first one."""
        if self._failure is None:
            self._failure = error
            self._pool._start(self._pool._close(self.id, self.epoch))
        return self._failure


def interruption_ms(interruption: Interruption, route: Route, now_s: float) -> dict[str, float]:
    """What an interruption that ends now, on the members of `route`, was made of since it was noticed: `restart`,
    `imports` and `weights` of the process that came for the dead one (0 where a stand-in was there), `restore` of the
    session into it, and `first_frame`. They add up to the whole.
    """
    before, start_s, restored_s = interruption.route, interruption.detected_s, interruption.restored_s
    same = [stage for stage, name in route.names.items() if before.names.get(stage) == name]
    lives = [route.lives[stage] for stage in same if route.lives[stage].id != before.lives[stage].id]
    life = max(lives, key=lambda life: life.created_s, default=None)
    ends_s = [start_s] * 3
    if life is not None:
        imported_s = life.created_s + life.imports_ms / 1e3
        ends_s = [life.created_s, imported_s, imported_s + life.weights_ms / 1e3]
    parts_ms = {}
    for part, end_s in zip(PARTS, (*ends_s, restored_s, now_s), strict=True):
        # A new process may have been there before the death of the old one was noticed.
        limit_s = now_s if part == "first_frame" else restored_s
        end_s = min(max(end_s, start_s), limit_s)
        parts_ms[part] = round((end_s - start_s) * 1e3, 1)
        start_s = end_s
    return parts_ms


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
