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
from cluster.engine import Engine
from cluster.errors import MemberLost, PoolFull, SessionClosed, StaleChunk
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


class Reference:
    """The artificial reference stage behind a door."""

    def __init__(self) -> None:
        self.door = asyncio.Event()
        self.door.set()

    async def keyframe(self, keyframe: Keyframe) -> ReferenceFeatures:
        await self.door.wait()
        return ArtificialReference(0.0).keyframe(keyframe)


@asynccontextmanager
async def running(max_batch: int = 4) -> AsyncIterator[tuple[Engine, Reference]]:
    reference = Reference()
    engine = Engine(Fragile(1.0), StageThread("denoise"), reference.keyframe, max_batch)
    task = asyncio.create_task(engine.run())
    for key in (ANNA, BEN):
        engine.open(key, "lease", ArtificialWindow())
    yield engine, reference
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def test_chunks_run_in_the_order_of_their_numbers_however_they_arrive() -> None:
    async with running() as (engine, _):
        finished: list[int] = []

        async def send(number: int) -> None:
            await engine.submit(ANNA, number, CHUNK)
            finished.append(number)

        await asyncio.gather(send(2), send(0), send(1))
        assert finished == [0, 1, 2]
        assert engine.sessions[ANNA].state.num_calls == 3


async def test_a_session_sits_out_until_its_keyframe_is_there_while_others_go_on() -> None:
    async with running() as (engine, reference):
        reference.door.clear()
        for number in range(KEYFRAME_CALL + 1):
            await engine.submit(ANNA, number, CHUNK)
        waiting = asyncio.create_task(engine.submit(ANNA, KEYFRAME_CALL + 1, CHUNK))
        for number in range(KEYFRAME_CALL):
            await engine.submit(BEN, number, CHUNK)
        assert not waiting.done()
        assert engine.sessions[ANNA].state == ArtificialWindow(KEYFRAME_CALL + 1, num_keyframes=0)
        reference.door.set()
        await waiting
        assert engine.sessions[ANNA].state == ArtificialWindow(KEYFRAME_CALL + 2, num_keyframes=1)


async def test_a_chunk_that_breaks_a_batch_ends_its_own_session_only() -> None:
    async with running() as (engine, _):
        bad, good = await asyncio.gather(
            engine.submit(ANNA, 0, POISON), engine.submit(BEN, 0, CHUNK), return_exceptions=True
        )
        assert isinstance(bad, FloatingPointError)
        assert good.clean.latents.shape == (CONFIG.window.chunk_frames, *CONFIG.latent_shape)
        assert (list(engine.sessions), engine.sessions[BEN].state.num_calls) == ([BEN], 1)


async def test_the_other_chunks_of_a_broken_session_fail_with_it() -> None:
    async with running() as (engine, _):
        results = await asyncio.gather(
            engine.submit(ANNA, 0, POISON), engine.submit(ANNA, 1, CHUNK), return_exceptions=True
        )
        assert [type(result) for result in results] == [FloatingPointError, FloatingPointError]


async def test_a_reference_stage_that_fails_ends_the_session_that_asked() -> None:
    async with running() as (engine, _):

        async def broken(keyframe: Keyframe) -> ReferenceFeatures:
            raise MemberLost("gone")

        engine.encode_keyframe = broken
        for number in range(KEYFRAME_CALL + 1):
            await engine.submit(ANNA, number, CHUNK)
        with pytest.raises(MemberLost):
            await engine.submit(ANNA, KEYFRAME_CALL + 1, CHUNK)
        await engine.submit(BEN, 0, CHUNK)


async def test_unknown_sessions_other_epochs_and_stale_chunks_are_refused() -> None:
    async with running() as (engine, _):
        for key in (("nobody", 0), ("anna", 1)):
            with pytest.raises(MemberLost):
                await engine.submit(key, 0, CHUNK)
        await engine.submit(ANNA, 0, CHUNK)
        with pytest.raises(StaleChunk):
            await engine.submit(ANNA, 0, CHUNK)


async def test_a_new_epoch_replaces_the_old_one() -> None:
    async with running() as (engine, _):
        waiting = asyncio.create_task(engine.submit(ANNA, 5, CHUNK))
        await asyncio.sleep(0)
        engine.open(("anna", 1), "lease", ArtificialWindow())
        with pytest.raises(SessionClosed):
            await waiting
        await engine.submit(("anna", 1), 0, CHUNK)


async def test_a_full_member_takes_another_session_when_one_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "MAX_SESSIONS", 2)
    async with running() as (engine, _):
        with pytest.raises(PoolFull):
            engine.open(("cleo", 0), "lease", ArtificialWindow())
        engine.close(ANNA[0], SessionClosed("it ended"))
        engine.open(("cleo", 0), "lease", ArtificialWindow())
        assert [record.session for record in engine.records()] == ["ben", "cleo"]
