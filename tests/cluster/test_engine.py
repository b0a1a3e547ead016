import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from cluster import engine as engine_module
from cluster.artificial import CONFIG, ArtificialDenoise, ArtificialMotion, ArtificialReference, ArtificialWindow
from cluster.engine import Done, EncodeKeyframe, Engine
from cluster.errors import MemberLost, PoolFull, SessionClosed, SessionMoved, StaleChunk
from cluster.messages import SessionKey, SessionRecord
from cluster.threads import StageThread
from stages.messages import Keyframe, MotionChunk, ReferenceFeatures

ANNA, BEN = ("anna", 0), ("ben", 0)
KEYFRAME_CALL = CONFIG.window.first_keyframe_call
FRAMES = np.zeros((CONFIG.window.chunk_frames, 8, 8, 3), np.uint8)
MOTION = ArtificialMotion(0.0)
CHUNK = MOTION.run([MOTION.open(FRAMES[0])], [FRAMES])[0][1]
POISON = replace(CHUNK, no_face=(True,))


@dataclass(frozen=True)
class Fragile(ArtificialDenoise):
    """The artificial stage, which some chunks break together with all that are in the same call."""

    def run(self, states: Sequence[ArtificialWindow], chunks: Sequence[MotionChunk]) -> Any:
        if any(chunk is POISON for chunk in chunks):
            raise FloatingPointError("poison")
        return super().run(states, chunks)


def counts(state: ArtificialWindow) -> tuple[int, int]:
    return state.num_calls, state.num_keyframes


class Reference:
    """The artificial reference stage behind a door."""

    def __init__(self) -> None:
        self.door = asyncio.Event()
        self.door.set()

    async def keyframe(self, keyframe: Keyframe) -> ReferenceFeatures:
        await self.door.wait()
        return ArtificialReference(0.0).keyframe(keyframe)


def seat(
    engine: Engine, key: SessionKey, keyframe: EncodeKeyframe | None = None, state: Any = ArtificialWindow()
) -> None:
    engine.open(SessionRecord(*key, "lease", {}), state, MOTION.open(FRAMES[0]), keyframe or Reference().keyframe)


async def send(engine: Engine, key: SessionKey, number: int, chunk: MotionChunk = CHUNK) -> Done:
    """A chunk after which the motion stage's state says that so many have been sent."""
    motion = replace(MOTION.open(FRAMES[0]), started=True, last_tokens=np.float32([number]))
    return await engine.submit(key, number, chunk, motion, due_s=0.0)


@asynccontextmanager
async def running(max_batch: int = 4) -> AsyncIterator[tuple[Engine, Reference]]:
    reference = Reference()
    engine = Engine(Fragile(1.0), StageThread("denoise"), max_batch)
    task = asyncio.create_task(engine.run())
    for key in (ANNA, BEN):
        seat(engine, key, reference.keyframe)
    yield engine, reference
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def test_chunks_run_in_the_order_of_their_numbers_however_they_arrive() -> None:
    async with running() as (engine, _):
        finished: list[int] = []

        async def finish(number: int) -> None:
            await send(engine, ANNA, number)
            finished.append(number)

        await asyncio.gather(finish(2), finish(0), finish(1))
        assert finished == [0, 1, 2]
        assert engine.sessions[ANNA].state.num_calls == 3


async def test_a_session_sits_out_until_its_keyframe_is_there_while_others_go_on() -> None:
    async with running() as (engine, reference):
        reference.door.clear()
        for number in range(KEYFRAME_CALL + 1):
            await send(engine, ANNA, number)
        waiting = asyncio.create_task(send(engine, ANNA, KEYFRAME_CALL + 1))
        for number in range(KEYFRAME_CALL):
            await send(engine, BEN, number)
        assert not waiting.done()
        assert counts(engine.sessions[ANNA].state) == (KEYFRAME_CALL + 1, 0)
        reference.door.set()
        await waiting
        assert counts(engine.sessions[ANNA].state) == (KEYFRAME_CALL + 2, 1)


async def test_a_chunk_that_breaks_a_batch_ends_its_own_session_only() -> None:
    async with running() as (engine, _):
        bad, good = await asyncio.gather(send(engine, ANNA, 0, POISON), send(engine, BEN, 0), return_exceptions=True)
        assert isinstance(bad, FloatingPointError)
        assert good.clean.latents.shape == (CONFIG.window.chunk_frames, *CONFIG.latent_shape)
        assert (list(engine.sessions), engine.sessions[BEN].state.num_calls) == ([BEN], 1)


async def test_the_other_chunks_of_a_broken_session_fail_with_it() -> None:
    async with running() as (engine, _):
        results = await asyncio.gather(send(engine, ANNA, 0, POISON), send(engine, ANNA, 1), return_exceptions=True)
        assert [type(result) for result in results] == [FloatingPointError, FloatingPointError]


async def test_a_reference_stage_that_fails_ends_the_session_that_asked() -> None:
    async with running() as (engine, _):

        async def broken(keyframe: Keyframe) -> ReferenceFeatures:
            raise MemberLost("gone")

        seat(engine, ("anna", 1), broken)
        for number in range(KEYFRAME_CALL + 1):
            await send(engine, ("anna", 1), number)
        with pytest.raises(MemberLost):
            await send(engine, ("anna", 1), KEYFRAME_CALL + 1)
        await send(engine, BEN, 0)


async def test_unknown_sessions_other_epochs_and_stale_chunks_are_refused() -> None:
    async with running() as (engine, _):
        for key in (("nobody", 0), ("anna", 1)):
            with pytest.raises(MemberLost):
                await send(engine, key, 0)
        await send(engine, ANNA, 0)
        with pytest.raises(StaleChunk):
            await send(engine, ANNA, 0)


async def test_a_new_epoch_replaces_the_old_one() -> None:
    async with running() as (engine, _):
        waiting = asyncio.create_task(send(engine, ANNA, 5))
        await asyncio.sleep(0)
        seat(engine, ("anna", 1))
        with pytest.raises(SessionMoved):
            await waiting
        await send(engine, ("anna", 1), 0)
        with pytest.raises(SessionMoved):
            await send(engine, ANNA, 0)
        with pytest.raises(SessionMoved):
            seat(engine, ANNA)
        assert list(engine.sessions) == [BEN, ("anna", 1)]


async def test_a_full_member_takes_another_session_when_one_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "MAX_SESSIONS", 2)
    async with running() as (engine, _):
        with pytest.raises(PoolFull):
            seat(engine, ("cleo", 0))
        engine.close(ANNA[0], SessionClosed("it ended"))
        seat(engine, ("cleo", 0))
        assert [record.session for record in engine.records()] == ["ben", "cleo"]


async def test_each_chunk_brings_a_snapshot_from_which_its_session_goes_on_elsewhere() -> None:
    async with running() as (engine, _):
        for number in range(KEYFRAME_CALL + 1):
            done = await send(engine, ANNA, number)
        window = done.snapshot.window
        assert (window.num_calls, len(window.keyframes)) == (KEYFRAME_CALL + 1, 1)
        assert done.snapshot.motion.last_tokens == [KEYFRAME_CALL]
    async with running() as (other, reference):
        features = [await reference.keyframe(keyframe) for keyframe in window.keyframes]
        seat(other, ("anna", 3), state=other.stage.restore(None, features, window))
        with pytest.raises(StaleChunk):
            await send(other, ("anna", 3), KEYFRAME_CALL)
        await send(other, ("anna", 3), KEYFRAME_CALL + 1)
        assert counts(other.sessions["anna", 3].state) == (KEYFRAME_CALL + 2, 1)


async def test_a_released_session_is_gone_and_its_snapshot_is_as_far_as_it_was() -> None:
    async with running() as (engine, _):
        for number in range(3):
            await send(engine, ANNA, number)
        early = asyncio.create_task(send(engine, ANNA, 7))
        await asyncio.sleep(0)
        snapshot = await engine.release(ANNA[0])
        assert (snapshot.window.num_calls, snapshot.motion.last_tokens) == (3, [2])
        with pytest.raises(SessionMoved):
            await early
        with pytest.raises(MemberLost):
            await send(engine, ANNA, 3)
        with pytest.raises(MemberLost):
            await engine.release(ANNA[0])


async def test_a_close_from_an_earlier_life_leaves_a_later_one_alone() -> None:
    async with running() as (engine, _):
        seat(engine, ("anna", 2))
        engine.close("anna", SessionClosed("it ended"), last_epoch=1)
        assert ("anna", 2) in engine.sessions
        engine.close("anna", SessionClosed("it ended"), last_epoch=2)
        assert ("anna", 2) not in engine.sessions
