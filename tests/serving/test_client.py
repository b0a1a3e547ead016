"""The command and the class against a real socket whose pipeline echoes."""

import asyncio
import hashlib
import json

import numpy as np
import pytest

from serving import protocol
from serving.client import Client, ServerError, UnreachableError, driving_frames, main, parse_args, run_client
from serving.settings import Settings
from stages.errors import UserError
from stages.portraits import MAX_BYTES
from stages.video import VideoWriter, read_video, square_resize


@pytest.fixture
def clip(tmp_path):
    """17 frames at 25 a second, wider than high, from 0 s on."""
    path = tmp_path / "driving.mp4"
    with VideoWriter(path) as writer:
        for number in range(17):
            writer.write(np.full((48, 80, 3), 40 + 10 * number, np.uint8), number / 25)
    return path


@pytest.fixture
def face(tmp_path, portrait):
    path = tmp_path / "face.png"
    path.write_bytes(portrait)
    return path


def arguments(server, clip, face, *more):
    out = clip.with_name("out.mp4")
    return parse_args(["--portrait", str(face), "--driving", str(clip), "--out", str(out), "--url", server.url, *more])


async def test_a_lossless_run_writes_every_frame_at_its_time_and_hashes_the_pixels(echo_server, clip, face):
    server = await echo_server()
    figures = await run_client(arguments(server, clip, face, "--lossless", "--codec", "raw", "--seed", "7"))
    assert (figures["frames_sent"], figures["frames_dropped"], figures["frames_received"]) == (17, 0, 17)
    pixels = hashlib.sha256()
    for frame in read_video(clip):
        pixels.update(square_resize(frame.rgb, 64).tobytes())
    assert figures["frames_sha256"] == pixels.hexdigest()
    written = [frame.time_s for frame in read_video(clip.with_name("out.mp4"))]
    assert written == pytest.approx([number / 25 for number in range(17)], abs=1e-3)


async def test_a_live_run_takes_as_long_as_the_video_and_reports_delays(echo_server, clip, face):
    server = await echo_server(chunk_s=0.02)
    began = asyncio.get_running_loop().time()
    figures = await run_client(arguments(server, clip, face))
    assert asyncio.get_running_loop().time() - began > 16 / 25
    assert figures["frames_sent"] == 17 == figures["frames_received"] + figures["frames_dropped"]
    assert set(figures) >= {"fps", "frames_sent", "frames_dropped", "frames_received", "delay_ms", "per_10_s"}
    assert figures["delay_ms"]["p50"] > 20
    assert figures["per_10_s"][0]["t_s"] == 0
    assert figures["stage_ms"] == {"denoise": 1.0}


async def test_seconds_and_loop_decide_how_much_is_sent(echo_server, clip, face):
    server = await echo_server()
    more = ("--lossless", "--loop", "--seconds", "1.2")
    assert (await run_client(arguments(server, clip, face, *more)))["frames_sent"] == 30
    assert (await run_client(arguments(server, clip, face, "--lossless", "--seconds", "0.4")))["frames_sent"] == 10


@pytest.mark.parametrize("mode", ["live", "lossless"])
async def test_a_client_that_waits_for_a_slow_model_is_not_idle(echo_server, clip, face, mode):
    server = await echo_server(Settings(idle_timeout_s=0.4), chunk_s=0.6, connect_s=0.6)
    figures = await run_client(arguments(server, clip, face, *(["--lossless"] if mode == "lossless" else [])))
    assert figures["frames_received"] + figures["frames_dropped"] == 17


def test_a_loop_keeps_the_rate_across_its_seam(clip):
    times = [frame.time_s for frame in driving_frames(clip, seconds=2.0, loop=True)]
    assert len(times) == 50 and np.diff(times) == pytest.approx(0.04, abs=1e-3)


async def test_a_refused_portrait_is_a_typed_error(echo_server):
    server = await echo_server()
    with pytest.raises(ServerError) as refused:
        await Client(server.url, portrait=b"no picture").__aenter__()
    assert refused.value.code == "bad_portrait"


@pytest.mark.parametrize("url", ["ws://127.0.0.1:9/v1/stream", "nonsense", "ws://127.0.0.1:99999/x"])
async def test_no_server_is_a_typed_error(url):
    with pytest.raises(UnreachableError, match="--url"):
        await Client(url, portrait="ada").__aenter__()


async def test_another_path_of_the_server_is_a_typed_error(echo_server):
    server = await echo_server()
    with pytest.raises(UnreachableError, match="no stream"):
        await Client(server.url + "/other", portrait="ada").__aenter__()


@pytest.mark.parametrize("mode", ["live", "lossless"])
async def test_a_server_that_dies_is_a_typed_error(echo_server, clip, face, mode):
    server = await echo_server(fail_after=1)
    with pytest.raises(UserError) as failed:
        await run_client(arguments(server, clip, face, *(["--lossless"] if mode == "lossless" else [])))
    assert failed.value.code == "internal"
    assert {path.name for path in clip.parent.iterdir()} == {"driving.mp4", "face.png"}


@pytest.mark.parametrize("end", ["the server's", "the user's"])
async def test_what_was_received_before_an_early_end_is_kept(echo_server, clip, face, end):
    server = await echo_server(fail_after=8 if end == "the server's" else 10**9, chunk_s=0.02)
    playing = asyncio.create_task(run_client(arguments(server, clip, face, "--loop", "--seconds", "60")))
    if end == "the user's":
        async with asyncio.timeout(10):
            while not server.pool.streams or server.pool.streams[0].num_calls < 8:
                await asyncio.sleep(0.01)
        playing.cancel()
    with pytest.raises((UserError, asyncio.CancelledError)):
        await playing
    assert len(list(read_video(clip.with_name("out.mp4")))) >= 3
    assert {path.name for path in clip.parent.iterdir()} == {"driving.mp4", "face.png", "out.mp4"}


async def test_a_portrait_file_too_large_for_a_message_is_shrunk(echo_server, clip, face, capsys):
    assert MAX_BYTES + protocol.MAX_HEADER_BYTES + 4 <= protocol.MAX_MESSAGE_BYTES
    server = await echo_server()
    face.write_bytes(face.read_bytes() + bytes(protocol.MAX_MESSAGE_BYTES))
    assert (await run_client(arguments(server, clip, face, "--lossless")))["frames_received"] == 17
    assert "is shrunk" in capsys.readouterr().err


@pytest.mark.parametrize("out", ["none/out.mp4", ".", "out.gif", "driving.mp4", "face.png"])
def test_an_output_that_cannot_be_written_is_refused_before_connecting(clip, face, capsys, out):
    place = ["--out", str(clip.parent / out), "--url", "ws://127.0.0.1:9/v1/stream"]
    before = clip.read_bytes()
    assert main(["--portrait", str(face), "--driving", str(clip), *place]) == 1
    assert capsys.readouterr().err.startswith("error: bad_out: ")
    assert clip.read_bytes() == before


@pytest.mark.parametrize(
    "more",
    [
        ("--seed", "-1"),
        ("--seed", str(2**32)),
        ("--seed", "x"),
        ("--quality", "0"),
        ("--seconds", "0"),
        ("--seconds", "nan"),
        ("--seconds", "inf"),
        ("--loop",),
    ],
)
def test_options_that_make_no_sense_are_refused_by_name(capsys, more):
    with pytest.raises(SystemExit) as end:
        parse_args(["--portrait", "ada", "--driving", "a.mp4", "--out", "b.mp4", *more])
    assert end.value.code == 2 and more[0] in capsys.readouterr().err


def test_the_largest_seed_is_the_protocols():
    options = parse_args(["--portrait", "ada", "--driving", "a.mp4", "--out", "b.mp4", "--seed", str(2**32 - 1)])
    assert options.seed == 2**32 - 1


def test_the_command_says_what_is_wrong_and_fails(clip, face, capsys):
    common = ["--out", str(clip.with_name("x.mp4")), "--url", "ws://127.0.0.1:9/v1/stream"]
    assert main(["--portrait", str(face), "--driving", str(clip), *common]) == 1
    assert "no_connection" in capsys.readouterr().err
    assert main(["--portrait", "nobody", "--driving", str(clip), *common]) == 1
    assert "bad_portrait" in capsys.readouterr().err
    assert main(["--portrait", str(face), "--driving", "none.mp4", *common]) == 1
    assert "bad_video" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--portrait", str(face), "--driving", str(clip), "--loop", *common])


async def test_the_command_prints_json(echo_server, clip, face, capsys):
    server = await echo_server()
    argv = ["--portrait", str(face), "--driving", str(clip), "--out", str(clip.with_name("o.mp4"))]
    status = await asyncio.to_thread(main, [*argv, "--url", server.url, "--lossless", "--json"])
    assert status == 0 and json.loads(capsys.readouterr().out)["frames_received"] == 17
