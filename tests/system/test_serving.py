"""The whole server with the bundled weights: what a person gets, and what a bad client does not get."""

import asyncio
import json
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from serving import abuse
from serving.client import Client, ServerError
from stages.portraits import BUNDLED_CLIP
from stages.video import VideoWriter, read_video
from stages.weights import TINY

from .conftest import MAX_FRAMES_BEHIND, readiness, running_server

pytestmark = pytest.mark.system

NUM_FRAMES = 30


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """The first frames of the bundled clip: a length that is no multiple of the chunk's."""
    path = tmp_path_factory.mktemp("clip") / "driving.mp4"
    with VideoWriter(path) as writer:
        for _, frame in zip(range(NUM_FRAMES), read_video(BUNDLED_CLIP), strict=False):
            writer.write(frame.rgb, frame.time_s)
    return path


def run(module, *arguments):
    """A command's JSON output."""
    command = [sys.executable, "-m", module, *map(str, arguments), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def client(server, clip, out, *more):
    return run("serving.client", "--portrait", "ada", "--driving", clip, "--out", out, "--url", server.stream, *more)


def test_the_pages_and_health_routes_answer(server):
    for path, part in (("", b"PersonaLive"), ("healthz", b"true"), ("readyz", b"true"), ("static/app.js", b"Session")):
        assert part in urllib.request.urlopen(server.page + path).read()
    portraits = json.loads(urllib.request.urlopen(server.page + "v1/portraits").read())
    assert {"name": "ada", "url": "v1/portraits/ada.png"} in portraits
    assert urllib.request.urlopen(server.page + portraits[0]["url"]).read()[:4] == b"\x89PNG"
    assert urllib.request.urlopen(server.page + "v1/clip.mp4").read() == BUNDLED_CLIP.read_bytes()
    with pytest.raises(urllib.error.HTTPError):
        urllib.request.urlopen(server.page + "v1/portraits/..%2Fdriving.png")


def test_the_log_names_the_page(server):
    assert f"open {server.page}" in server.log.read_text()


def test_a_lossless_stream_has_the_pixels_of_the_offline_tool(server, clip, tmp_path):
    seeded = ("--seed", "7")
    online = client(server, clip, tmp_path / "a.mp4", *seeded, "--lossless", "--codec", "raw")
    offline = run("stages.animate", "--portrait", "ada", "--driving", clip, "--out", tmp_path / "b.mp4", *seeded)
    assert (online["frames_sent"], online["frames_dropped"]) == (NUM_FRAMES, 0)
    assert online["frames_received"] == NUM_FRAMES
    assert online["frames_sha256"] == offline["frames_sha256"]


def test_a_live_stream_moves_the_portrait_with_a_bounded_delay(server, clip, tmp_path):
    figures = client(server, clip, tmp_path / "live.mp4", "--loop", "--seconds", "8")
    assert figures["frames_sent"] == figures["frames_received"] + figures["frames_dropped"] == 200
    assert figures["delay_ms"]["p95"] / 1000 * figures["fps"] < MAX_FRAMES_BEHIND
    frames = [frame.rgb.astype(int) for frame in read_video(tmp_path / "live.mp4")]
    assert len(frames) == figures["frames_received"]
    assert np.abs(frames[-1] - frames[0]).mean() > 1


async def stream(server, portrait, num_frames):
    """A lossless session; returns its output pictures."""
    frames = [frame.rgb for _, frame in zip(range(num_frames), read_video(BUNDLED_CLIP), strict=False)]

    async with Client(server.stream, portrait=portrait, mode="lossless", codec="raw", seed=3) as session:

        async def send():
            for rgb in frames:
                await session.send(rgb)
            await session.end()

        sending = asyncio.create_task(send())
        outputs = [output.rgb async for output in session if output.message.seq is not None]
        await sending
    return np.stack(outputs).astype(int)


async def test_two_sessions_at_once_are_each_as_if_alone(server):
    alone = [await stream(server, portrait, 14) for portrait in ("ada", "ben")]
    together = await asyncio.gather(*(stream(server, portrait, 14) for portrait in ("ada", "ben")))
    for one, other in zip(alone, together, strict=True):
        assert np.abs(one - other).max() <= 1
    assert np.abs(together[0] - together[1]).mean() > 5


async def test_a_portrait_without_a_usable_face_is_refused(server, tmp_path):
    Image.new("RGB", (300, 300), "white").save(tmp_path / "white.png")
    with pytest.raises(ServerError) as refused:
        await Client(server.stream, portrait=(tmp_path / "white.png").read_bytes()).__aenter__()
    assert refused.value.code == "no_face_in_portrait"


async def test_bad_clients_get_their_typed_errors_and_a_bystander_does_not_notice(server):
    expected = await stream(server, "ada", 24)
    watching = asyncio.create_task(stream(server, "ada", 24))
    figures = await abuse.abuse_server(server.stream, len(abuse.ABUSES), server.pid)
    assert figures["wrong"] == []
    assert np.abs(await watching - expected).max() <= 1


async def test_bad_clients_leave_no_memory_behind(server):
    grown_mb = []
    # A leak grows every time; what an allocator takes once, it does not take again.
    while len(grown_mb) < 2 and (not grown_mb or grown_mb[-1] > 30):
        figures = await abuse.abuse_server(server.stream, 60, server.pid)
        early, late = figures["server_rss_mb"].values()
        assert figures["wrong"] == [] and early > 100
        grown_mb.append(late - early)
    assert grown_mb[-1] <= 30, grown_mb


async def test_silent_clients_are_ended_and_give_their_places_back(light_weights):
    # A light model lets all of them in before the first has brought no frames for too long.
    with running_server(weights=light_weights, pause_timeout_s=10, max_sessions=8, target_fps=1) as server:
        async with asyncio.timeout(240):
            sessions = [Client(server.stream, portrait="ada") for _ in range(8)]
            await asyncio.gather(*(session.__aenter__() for session in sessions))
            with pytest.raises(ServerError) as refused:
                await Client(server.stream, portrait="ada").__aenter__()
            assert refused.value.code == "busy"
            for session in sessions:
                with pytest.raises(ServerError) as ended:
                    async for _ in session:
                        pass
                assert ended.value.code == "idle"
        assert len(await stream(server, "ada", 4)) == 4


async def test_weights_that_fail_to_load_are_named_and_tried_again_without_being_asked(tmp_path):
    missing = shutil.copytree(TINY, tmp_path / "weights") / "vae.safetensors"
    missing.rename(tmp_path / "vae.safetensors")
    with running_server(ready=False, weights=str(tmp_path / "weights")) as server:
        status, reason = readiness(server)
        assert status == 503 and "vae.safetensors is missing" in reason
        with pytest.raises(ServerError, match=r"vae\.safetensors is missing") as refused:
            await Client(server.stream, portrait="ada").__aenter__()
        assert refused.value.code == "pool_failed"
        (tmp_path / "vae.safetensors").rename(missing)
        async with asyncio.timeout(240):
            while readiness(server) != (200, None):
                await asyncio.sleep(1)
        assert len(await stream(server, "ada", 4)) == 4


def test_a_media_file_goes_through_when_there_is_one(server, tmp_path, media_dir):
    figures = run(
        "serving.client",
        *("--portrait", media_dir / "portrait.png", "--driving", media_dir / "driving.mp4"),
        *("--out", tmp_path / "out.mp4", "--url", server.stream, "--seconds", "3", "--lossless"),
    )
    assert figures["frames_received"] == figures["frames_sent"] == 75
    assert Path(tmp_path / "out.mp4").stat().st_size > 1000
