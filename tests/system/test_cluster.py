"""The pool on a real local Ray: sessions, deaths, leases. Stages sleep where their results do not matter."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from ray.util import list_named_actors
from ray.util.placement_group import placement_group_table

from cluster.artificial import CONFIG
from cluster.errors import BadChunk, PoolBusy, PoolFailed, SessionClosed, SessionMoved
from cluster.messages import SessionRecord
from cluster.overlap import measure
from cluster.pool import NAMESPACE
from cluster.session import DecodedChunk, Pool, Session
from cluster.settings import STAGES, PoolSettings, pool_name
from stages.config import (
    ImageEncoderConfig,
    KeypointConfig,
    ModelConfig,
    MotionEncoderConfig,
    PoseGuiderConfig,
    UNetConfig,
    VaeConfig,
    WindowConfig,
)
from stages.errors import BadPortrait
from stages.messages import Pixels

pytestmark = pytest.mark.system

EVERYBODY_FPS = 0.1
"""A target rate at which all have a place, however slow the machine."""
SLEEPING = PoolSettings(
    artificial_ms=(("motion", 20.0), ("denoise", 20.0), ("decode", 20.0)), lease_s=3.0, target_fps=EVERYBODY_FPS
)
DRIVING = np.zeros((CONFIG.window.chunk_frames, CONFIG.size_px, CONFIG.size_px, 3), np.uint8)
PORTRAIT = DRIVING[0]

SMALL = ModelConfig(
    name="small",
    size_px=32,
    unet=UNetConfig(
        block_channels=(8, 16),
        attention_levels=(True, False),
        layers_per_block=1,
        num_heads=2,
        cross_attention_dim=6,
        num_norm_groups=4,
        num_motion_heads=2,
        num_temporal_heads=4,
        max_positions=9,
    ),
    motion_encoder=MotionEncoderConfig(
        crop_px=32,
        stem_channels=4,
        mid_channels=4,
        trunk_channels=8,
        num_landmarks=5,
        attention_dim=32,
        num_attention_heads=2,
        num_norm_groups=2,
        hourglass_depth=2,
        num_tokens=3,
        token_dim=4,
    ),
    keypoints=KeypointConfig(image_px=32, depths=(1, 1, 1, 1), dims=(4, 6, 8, 10)),
    pose_guider=PoseGuiderConfig(channels=(4, 6, 8)),
    vae=VaeConfig(block_channels=(4, 6, 8), layers_per_block=1, num_norm_groups=2),
    image_encoder=ImageEncoderConfig(
        image_px=28, hidden_dim=8, intermediate_dim=12, num_layers=1, num_heads=2, projection_dim=6
    ),
    # Every motion differs from every other by more than this: keyframes from the second call on, until there are two.
    window=WindowConfig(
        chunk_frames=2, timesteps=(0, 400, 999), max_keyframes=2, keyframe_threshold=0.0, first_keyframe_call=1
    ),
)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Random weights of a small model."""
    import torch

    from stages.weights import NETWORKS, save_folder

    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(5)
    save_folder(folder, SMALL, {name: build(SMALL).state_dict() for name, build in NETWORKS.items()})
    return str(folder)


def computing(weights: str) -> PoolSettings:
    """A pool whose results matter."""
    return PoolSettings(weights, num_threads=1, lease_s=3.0, target_fps=EVERYBODY_FPS, device="cpu")


def pictures(seed: int, num_chunks: int) -> Pixels:
    """(num_chunks, chunk_frames, s, s, 3) noise."""
    shape = (num_chunks, SMALL.window.chunk_frames, SMALL.size_px, SMALL.size_px, 3)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def in_one_process(weights: str, portrait: Pixels, chunks: Pixels, seed: int) -> tuple[list[Pixels], int]:
    """What the stages make of a video when one follows the other, and the number of keyframes."""
    from stages.pipeline import load_stages

    stages: Any = load_stages(weights, STAGES, "cpu", 1)
    motion, num_keyframes, frames = stages.motion.open(portrait), 0, []
    window = stages.denoise.open(stages.reference.open(portrait), motion.portrait_tokens, seed)
    for chunk in chunks:
        [(motion, moved)] = stages.motion.run([motion], [chunk])
        [(window, clean, keyframe)] = stages.denoise.run([window], [moved])
        frames += stages.decode.run([clean])
        if keyframe is not None:
            num_keyframes += 1
            window = stages.denoise.add_keyframe(window, stages.reference.keyframe(keyframe))
    return frames, num_keyframes


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # Ray's socket paths must stay short
    ray.init(address="local", num_cpus=2, _temp_dir=folder, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@asynccontextmanager
async def connected(settings: PoolSettings) -> AsyncIterator[Pool]:
    pool = await Pool.connect(settings)
    yield pool
    await pool.close()
    await removed(settings)


async def removed(settings: PoolSettings) -> None:
    await until(lambda: not actors(settings) and not groups(settings), within_s=3 * settings.lease_s)


async def until(condition: Callable[[], bool], within_s: float) -> None:
    deadline_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline_s, "waited too long"
        await asyncio.sleep(0.1)


def actors(settings: PoolSettings) -> list[str]:
    names = [actor["name"] for actor in list_named_actors(all_namespaces=True)]
    return sorted(name for name in names if name.startswith(pool_name(settings)))


def groups(settings: PoolSettings) -> list[str]:
    table = placement_group_table().values()
    return [group["state"] for group in table if group["name"] == pool_name(settings) and group["state"] != "REMOVED"]


async def process(settings: PoolSettings, member: str = "") -> int:
    """The process of a member, or of the manager."""
    name = pool_name(settings) + (f":{member}" if member else "")
    pid: int = await ray.get_actor(name, NAMESPACE).__ray_call__.remote(lambda self: os.getpid())
    return pid


async def send(session: Session, num_chunks: int, frames: Pixels = DRIVING) -> list[Any]:
    """Chunks all at once: their results, or errors."""
    return await asyncio.gather(*(session.run(frames) for _ in range(num_chunks)), return_exceptions=True)


async def test_sessions_stream_side_by_side_and_report_their_times() -> None:
    async with connected(SLEEPING) as pool:
        anna, ben = await asyncio.gather(pool.open(PORTRAIT, 1), pool.open(PORTRAIT, 2))
        results = await asyncio.gather(send(anna, 12), send(ben, 12))
        for result in [result for of_session in results for result in of_session]:
            assert isinstance(result, DecodedChunk), result
            assert (result.frames.shape, result.no_face) == (DRIVING.shape, (False,) * len(DRIVING))
            assert result.stage_ms["denoise"] >= 20
            assert set(result.stage_ms) == {s + t for s in ("motion", "denoise", "decode") for t in ("", "_wait")}


@pytest.mark.parametrize(("max_batch", "max_difference"), [(1, 0), (4, 1)])
async def test_interleaved_sessions_equal_one_process_keyframes_included(
    weights: str, max_batch: int, max_difference: int
) -> None:
    settings = replace(computing(weights), max_batch=max_batch)
    portrait, chunks = pictures(0, 1)[0, 0], {7: pictures(1, 8), 8: pictures(2, 8)}
    async with connected(settings) as pool:
        assert pool.config == SMALL
        sessions = {seed: await pool.open(portrait, seed) for seed in chunks}
        tasks = [asyncio.create_task(sessions[seed].run(chunks[seed][i])) for i in range(8) for seed in chunks]
        results = [result.frames for result in await asyncio.gather(*tasks)]
    for offset, seed in enumerate(chunks):
        expected, num_keyframes = in_one_process(weights, portrait, chunks[seed], seed)
        assert num_keyframes == SMALL.window.max_keyframes
        assert np.ptp(expected) > 10, "a picture without contrast would equal any other"
        difference = np.abs(np.stack(results[offset::2]).astype(int) - np.stack(expected))
        assert difference.max() <= max_difference


async def test_frames_of_another_size_are_refused_and_the_session_goes_on() -> None:
    async with connected(SLEEPING) as pool:
        with pytest.raises(BadPortrait):
            await pool.open(PORTRAIT[:-1], 0)
        session = await pool.open(PORTRAIT, 0)
        for frames in (DRIVING[:-1], DRIVING[:, 1:], DRIVING.astype(np.float32)):
            with pytest.raises(BadChunk):
                await session.run(frames)
        assert isinstance(await session.run(DRIVING), DecodedChunk)


async def test_a_closed_session_fails_what_is_in_flight_and_leaves_nothing_on_its_member() -> None:
    async with connected(SLEEPING) as pool:
        session = await pool.open(PORTRAIT, 0)
        pending = asyncio.create_task(send(session, 5))
        await asyncio.sleep(0.05)
        await session.close()
        assert isinstance((await pending)[-1], SessionClosed)
        member = ray.get_actor(f"{pool_name(SLEEPING)}:denoise-0", NAMESPACE)
        assert (await member.report.remote()).sessions == ()


async def test_chunks_that_nobody_waits_for_leave_no_error_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    async with connected(SLEEPING) as pool:
        session = await pool.open(PORTRAIT, 0)
        calls = [asyncio.create_task(session.run(DRIVING)) for _ in range(4)]
        await asyncio.sleep(0.05)
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        await session.close()
        del call, calls
        # Ray reports an error that nobody has seen some seconds later.
        await asyncio.sleep(7.0)
    assert "Unhandled error" not in caplog.text


async def test_openings_that_nobody_waits_for_leave_nothing_on_the_member() -> None:
    settings = replace(SLEEPING, artificial_ms=(*SLEEPING.artificial_ms, ("reference", 150.0)))
    async with connected(settings) as pool:
        for _ in range(6):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(pool.open(PORTRAIT, 0), 0.05)
        # Portraits are encoded in turn, so by now all six have come to their ends.
        session = await pool.open(PORTRAIT, 0)
        member = ray.get_actor(f"{pool_name(settings)}:denoise-0", NAMESPACE)
        manager = ray.get_actor(pool_name(settings), NAMESPACE)
        await asyncio.sleep(1.0)
        assert [record.session for record in (await member.report.remote()).sessions] == [session.id]
        assert await manager.__ray_call__.remote(lambda self: set(self.seats)) == {session.id}


async def test_clients_that_leave_at_once_do_not_queue_up_work_before_others() -> None:
    settings = replace(SLEEPING, artificial_ms=(*SLEEPING.artificial_ms, ("reference", 150.0)))
    async with connected(settings) as pool:
        await pool.open(PORTRAIT, 0)
        leaving = [asyncio.wait_for(pool.open(PORTRAIT, 0), 0.05) for _ in range(40)]
        assert all(isinstance(error, TimeoutError) for error in await asyncio.gather(*leaving, return_exceptions=True))
        started_s = time.monotonic()
        await pool.open(PORTRAIT, 0)
        # All forty of them would take six seconds, the eight that may open at once 1.2.
        assert time.monotonic() - started_s < 3.5


def _open_ghost(member: Any) -> None:
    [hosted] = member.engine.sessions.values()
    member.engine.open(SessionRecord("ghost", 0, "lapsed", {}), hosted.state, hosted.motion, hosted.encode_keyframe)


async def test_a_session_whose_lease_has_lapsed_while_it_opened_is_closed() -> None:
    async with connected(SLEEPING) as pool:
        session = await pool.open(PORTRAIT, 0)
        member = ray.get_actor(f"{pool_name(SLEEPING)}:denoise-0", NAMESPACE)
        await member.__ray_call__.remote(_open_ghost)
        await asyncio.sleep(3.0)
        assert [record.session for record in (await member.report.remote()).sessions] == [session.id]


async def test_a_connection_knows_when_its_pool_has_failed_and_when_it_is_back(weights: str, tmp_path: Path) -> None:
    folder = shutil.copytree(weights, tmp_path / "weights")
    settings = computing(str(folder))
    name = pool_name(settings)
    async with connected(settings) as pool:
        assert pool.failed is None
        (folder / "vae.safetensors").rename(tmp_path / "vae.safetensors")
        ray.kill(ray.get_actor(name, NAMESPACE))
        await until(lambda: pool.failed is not None and "vae.safetensors is missing" in str(pool.failed), within_s=120)
        (tmp_path / "vae.safetensors").rename(folder / "vae.safetensors")
        await until(lambda: pool.failed is None, within_s=120)


class Heard:
    """A listener that notes what it hears."""

    def __init__(self) -> None:
        self.events: list[Any] = []

    async def queued(self, position: int, estimate_s: float) -> None:
        self.events.append(position)

    async def recovering(self) -> None:
        self.events.append("recovering")

    async def recovered(self, parts_ms: Mapping[str, float]) -> None:
        self.events.append(dict(parts_ms))


@pytest.mark.parametrize("member", ["denoise-0", "decode-0", "motion+reference-0"])
async def test_after_a_members_death_the_results_are_those_of_one_process(weights: str, member: str) -> None:
    settings = computing(weights)
    portrait, chunks = pictures(0, 1)[0, 0], pictures(1, 9)
    heard = Heard()
    async with connected(settings) as pool:
        session = await pool.open(portrait, 7, listener=heard)
        results = [await session.run(chunk) for chunk in chunks[:5]]
        others = {name: await process(settings, name) for name in ("denoise-0", "decode-0") if name != member}
        pending = asyncio.gather(*(session.run(chunk) for chunk in chunks[5:]))
        await asyncio.sleep(0.01)
        os.kill(await process(settings, member), signal.SIGKILL)
        results += await pending
        assert others == {name: await process(settings, name) for name in others}
    expected, num_keyframes = in_one_process(weights, portrait, chunks, 7)
    assert num_keyframes == SMALL.window.max_keyframes
    assert [event if event == "recovering" else "recovered" for event in heard.events] == ["recovering", "recovered"]
    parts_ms = heard.events[1]
    assert set(parts_ms) == {"restart", "imports", "weights", "restore", "first_frame"}
    # What the new process did before the death was noticed is no part of the interruption.
    assert min(parts_ms.values()) >= 0 and sum(parts_ms.values()) > 10
    difference = np.abs(np.stack([result.frames for result in results]).astype(int) - np.stack(expected))
    assert difference.max() <= 1


async def test_a_spare_stands_in_at_once_and_for_every_stage() -> None:
    settings = replace(SLEEPING, spare_members=1)
    async with connected(settings) as pool:
        heard = [Heard(), Heard()]
        sessions = [await pool.open(PORTRAIT, 1, listener=listener) for listener in heard]
        assert await process(settings, "spare-0")
        for member in ("denoise-0", "decode-0", "motion+reference-0"):
            await asyncio.gather(*(send(session, 2) for session in sessions))
            await until_up(settings)
            os.kill(await process(settings, member), signal.SIGKILL)
            results = await asyncio.gather(*(send(session, 4) for session in sessions))
            assert all(isinstance(result, DecodedChunk) for of_session in results for result in of_session), results
        for listener in heard:
            parts = [event for event in listener.events if event != "recovering"]
            assert len(parts) == 3
            assert all(part["restart"] == part["imports"] == 0 for part in parts), parts


async def until_up(settings: PoolSettings) -> None:
    """Waits until the manager says that all members live."""
    manager = ray.get_actor(pool_name(settings), NAMESPACE)
    async with asyncio.timeout(60):
        while not all(member["up"] for member in (await manager.status.remote())["members"]):
            await asyncio.sleep(0.1)


@pytest.mark.parametrize("member", ["denoise-0", "decode-0"])
async def test_a_member_that_hangs_is_replaced(member: str) -> None:
    settings = replace(SLEEPING, hang_s=2.0)
    async with connected(settings) as pool:
        session = await pool.open(PORTRAIT, 0)
        await send(session, 2)
        hanging = await process(settings, member)
        os.kill(hanging, signal.SIGSTOP)
        started_s = time.monotonic()
        assert all(isinstance(result, DecodedChunk) for result in await send(session, 4))
        assert 1.0 < time.monotonic() - started_s < 25
        assert await process(settings, member) != hanging


def _hang(member: Any) -> None:
    thread = member.threads["denoise"]
    thread.executor.submit(thread._work, time.sleep, 1000)


async def test_a_stage_whose_call_never_ends_is_replaced_with_its_member() -> None:
    settings = replace(SLEEPING, hang_s=2.0)
    async with connected(settings) as pool:
        session = await pool.open(PORTRAIT, 0)
        await send(session, 2)
        hanging = await process(settings, "denoise-0")
        member = ray.get_actor(f"{pool_name(settings)}:denoise-0", NAMESPACE)
        await member.__ray_call__.remote(_hang)
        assert all(isinstance(result, DecodedChunk) for result in await send(session, 4))
        assert await process(settings, "denoise-0") != hanging


async def test_a_session_goes_on_at_another_replica_with_its_id_alone(weights: str) -> None:
    settings = computing(weights)
    portrait, chunks = pictures(0, 1)[0, 0], pictures(1, 8)
    async with connected(settings) as first:
        second = await Pool.connect(settings)
        session = await first.open(portrait, 7)
        results = [await session.run(chunk) for chunk in chunks[:4]]
        moved = await second.resume(session.id, portrait)
        assert moved is not None
        with pytest.raises(SessionMoved):
            await session.run(chunks[4])
        # What the first replica says now is of an earlier life.
        await session.close()
        results += [await moved.run(chunk) for chunk in chunks[4:]]
        assert await second.resume("unknown", portrait) is None
        manager = ray.get_actor(pool_name(settings), NAMESPACE)
        assert (await manager.status.remote())["num_sessions"] == 1
        await second.close()
    expected, _ = in_one_process(weights, portrait, chunks, 7)
    difference = np.abs(np.stack([result.frames for result in results]).astype(int) - np.stack(expected))
    assert difference.max() <= 1


async def test_a_parked_session_can_be_resumed_until_its_time_is_over() -> None:
    async with connected(SLEEPING) as pool:
        sessions = [await pool.open(PORTRAIT, 0) for _ in range(2)]
        for session in sessions:
            await session.run(DRIVING)
            session.park(1.0)
            with pytest.raises(SessionClosed):
                await session.run(DRIVING)
        resumed = await pool.resume(sessions[0].id, PORTRAIT)
        await asyncio.sleep(1.5)
        assert resumed is not None and isinstance(await resumed.run(DRIVING), DecodedChunk)
        assert await pool.resume(sessions[1].id, PORTRAIT) is None


async def test_who_comes_when_all_places_are_taken_waits_in_line_and_the_next_is_refused() -> None:
    # A chunk of four frames lasts 40 ms at this rate, and a call 20: one place, or one round more than fits.
    settings = replace(SLEEPING, target_fps=100.0, max_queue=1)
    async with connected(settings) as pool:
        first = await pool.open(PORTRAIT, 0)
        heard = Heard()
        waiting = asyncio.create_task(pool.open(PORTRAIT, 0, listener=heard))
        await asyncio.sleep(0.5)
        assert heard.events == [1] and not waiting.done()
        with pytest.raises(PoolBusy) as refused:
            await pool.open(PORTRAIT, 0)
        assert refused.value.retry_s > 0
        await first.rest()
        second = await asyncio.wait_for(waiting, 3)
        waking = asyncio.create_task(first.wake())
        await asyncio.sleep(1.5)
        assert not waking.done()
        await second.close()
        await asyncio.wait_for(waking, 3)
        assert isinstance(await first.run(DRIVING), DecodedChunk)


async def test_a_killed_manager_is_not_noticed_and_comes_back_with_its_table() -> None:
    async with connected(SLEEPING) as pool:
        session = await pool.open(PORTRAIT, 0)
        before = await process(SLEEPING)
        os.kill(before, signal.SIGKILL)
        assert all(isinstance(result, DecodedChunk) for result in await send(session, 12))
        another = await pool.open(PORTRAIT, 0)
        assert isinstance(await another.run(DRIVING), DecodedChunk)
        assert await process(SLEEPING) != before
        manager = ray.get_actor(pool_name(SLEEPING), NAMESPACE)
        seats = await manager.__ray_call__.remote(lambda self: set(self.seats))
        assert seats == {session.id, another.id}
        assert len(actors(SLEEPING)) == 4


async def test_a_pool_goes_with_its_last_lease_even_when_nobody_says_goodbye() -> None:
    staying, vanishing = await Pool.connect(SLEEPING), await Pool.connect(SLEEPING)
    abandoned = await vanishing.open(PORTRAIT, 0)
    vanishing._renewing.cancel()
    member = ray.get_actor(f"{pool_name(SLEEPING)}:denoise-0", NAMESPACE)
    assert [record.session for record in (await member.report.remote()).sessions] == [abandoned.id]
    await asyncio.sleep(2 * SLEEPING.lease_s)
    assert (await member.report.remote()).sessions == ()
    assert len(actors(SLEEPING)) == 4
    staying._renewing.cancel()
    await removed(SLEEPING)


async def test_a_pool_that_has_gone_is_made_again_for_whoever_still_wants_it() -> None:
    pool = await Pool.connect(SLEEPING)
    pool._renewing.cancel()
    await removed(SLEEPING)
    session = await pool.open(PORTRAIT, 0)
    # By then the new manager has looked for sessions without a lease.
    await asyncio.sleep(1.2)
    assert isinstance(await session.run(DRIVING), DecodedChunk)
    await pool.close()
    await removed(SLEEPING)


async def test_weights_that_do_not_load_are_told_with_their_reason(tmp_path: Path) -> None:
    settings = PoolSettings(weights=str(tmp_path / "nowhere"), lease_s=3.0)
    started_s = time.monotonic()
    with pytest.raises(PoolFailed, match="nowhere"):
        await Pool.connect(settings)
    assert time.monotonic() - started_s < 30
    await until(lambda: not actors(settings) and not groups(settings), within_s=15)


async def test_a_cluster_without_a_gpu_is_told_as_such() -> None:
    with pytest.raises(PoolFailed, match="GPU"):
        await Pool.connect(replace(SLEEPING, device="cuda"))


async def test_the_stages_overlap() -> None:
    result = await measure(artificial_ms=100.0, num_chunks=30)
    assert result.ratio >= 2.4, result
