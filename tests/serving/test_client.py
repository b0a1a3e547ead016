"""The command and the class against a real socket whose pipeline echoes."""

import asyncio
import contextlib
import hashlib
import json
from urllib.parse import urlsplit

import numpy as np
import pytest

from serving import protocol
from serving.client import Client, ServerError, UnreachableError, driving_frames, main, now_ms, parse_args, run_client
from serving.codec import encode
from serving.settings import Settings
from stages.errors import UserError
from stages.portraits import MAX_BYTES
from stages.video import VideoWriter, read_video, square_resize

from .conftest import say, saying


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


READY = protocol.Ready("s", 64, 3, 4, 9, 30.0, 0, 2**22, 10**7, 30.0, token="token")


def output(index, **dropped):
    return protocol.OutputFrame(index, None, None, False, None, {}, dropped, 64, 64)


class Proxy:
    """Passes bytes on to a server; its connections can be cut, and while it is down it takes no new ones."""

    def __init__(self, server_url):
        self._behind = urlsplit(server_url)
        self._writers = []
        self.is_down = False
        self.url = ""

    async def __aenter__(self):
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.url = f"ws://127.0.0.1:{self._server.sockets[0].getsockname()[1]}{self._behind.path}"
        return self

    async def __aexit__(self, *exc_info):
        self._server.close()
        self.cut()

    def cut(self):
        for writer in self._writers:
            writer.transport.abort()

    async def _connected(self, reader, writer):
        if self.is_down:
            writer.close()
            return
        behind = await asyncio.open_connection(self._behind.hostname, self._behind.port)
        self._writers += [writer, behind[1]]
        await asyncio.gather(pass_on(reader, behind[1]), pass_on(behind[0], writer))


async def pass_on(reader, writer):
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(2**16):
            writer.write(data)
    writer.close()


def picture(number):
    return np.full((64, 64, 3), number % 251 + 1, np.uint8)


async def send_until(client, has_enough, rate=100):
    """Sends numbered pictures until the test has seen enough; returns how many."""
    number = 0
    while not has_enough():
        assert await client.send(picture(number)) == number
        number += 1
        await asyncio.sleep(1 / rate)
    await client.end()
    return number


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


async def test_a_live_session_outlives_its_connections(echo_server, portrait):
    server = await echo_server(chunk_s=0.01)
    seqs = []
    async with Proxy(server.url) as proxy, Client(proxy.url, portrait=portrait, codec="raw") as client:
        sending = asyncio.create_task(send_until(client, lambda: client.num_reconnects == 2 and seqs[-1] > last_cut))
        last_cut = 0
        async for output in client:
            if output.message.seq is not None:
                assert np.array_equal(output.rgb, picture(output.message.seq))
                seqs.append(output.message.seq)
            if len(seqs) in (6, 40) and seqs[-1] > last_cut:
                last_cut = seqs[-1] + 50
                proxy.cut()
        num_frames = await sending
    assert seqs == sorted(set(seqs)) and seqs[-1] == num_frames - 1
    assert [event.name for event in client.events] == ["lost", "reconnected"] * 2
    assert client.ended is not None
    await server.until_closed()


async def test_frames_without_a_connection_are_dropped_and_counted(echo_server, portrait):
    server = await echo_server()
    async with Proxy(server.url) as proxy, Client(proxy.url, portrait=portrait) as client:
        await client.send(picture(0))
        proxy.is_down = True
        proxy.cut()
        while not client.events:
            await asyncio.sleep(0.01)
        assert [await client.send(picture(number)) for number in (1, 2, 3)] == [1, 2, 3]
        assert client.num_unsent == 3
        proxy.is_down = False
        while not client.num_reconnects:
            await asyncio.sleep(0.01)
        assert await client.send(picture(4)) == 4
        await client.end()
        seqs = [output.message.seq async for output in client]
    assert seqs[-1] == 4 and not {1, 2, 3} & set(seqs) and client.num_unsent == 3


async def test_receipts_belong_to_the_connection_that_the_output_came_on(scripted_server):
    receipts = [[], []]

    def showing(number, num_outputs):
        async def handle(socket):
            await say(socket, READY, *[output(index) for index in range(num_outputs)])
            while len(receipts[number]) < num_outputs:
                message = protocol.parse_client(await socket.recv())[0]
                receipts[number] += [message] if isinstance(message, protocol.Shown) else []
            if number == 0:
                await say(socket, protocol.Notice("draining", "this replica is being replaced"))
                await socket.wait_closed()
            else:
                await say(socket, protocol.Ended(0, 0, 2, {}))

        return handle

    server = await scripted_server(showing(0, 3), showing(1, 2))
    async with Client(server.url, portrait="ada", decode=False) as client:
        began_ms = now_ms()
        assert [output.message.index async for output in client] == [0, 1, 2, 0, 1]
    assert [[shown.count for shown in shown_to] for shown_to in receipts] == [[1, 2, 3], [1, 2]]
    times_ms = [shown.shown_ms for shown_to in receipts for shown in shown_to]
    assert times_ms == sorted(times_ms) and began_ms <= times_ms[0] and times_ms[-1] <= now_ms()


async def test_drops_are_summed_over_connections(scripted_server):
    async def break_off(socket):
        await say(socket, READY, output(0, surplus=3), output(1, surplus=5, stale=1))
        socket.transport.close()

    server = await scripted_server(
        break_off, saying(READY, output(0, surplus=2), protocol.Ended(9, 5, 1, {"surplus": 4}))
    )
    async with Client(server.url, portrait="ada", decode=False) as client:
        assert [output.message.index async for output in client] == [0, 1, 0]
    assert client.dropped == {"surplus": 9, "stale": 1}


async def test_a_server_that_does_not_come_back_is_a_typed_error(echo_server, portrait):
    server = await echo_server()
    async with Proxy(server.url) as proxy, Client(proxy.url, portrait=portrait, reconnect_s=0.5) as client:
        proxy.is_down = True
        proxy.cut()
        with pytest.raises(UnreachableError):
            async for _ in client:
                pass
        await client.send(picture(0))
    assert client.num_unsent == 1 and client.num_reconnects == 0


async def test_a_lossless_session_ends_with_its_connection(echo_server, portrait):
    server = await echo_server()
    async with Proxy(server.url) as proxy, Client(proxy.url, portrait=portrait, mode="lossless") as client:
        await client.send(picture(0))
        proxy.cut()
        with pytest.raises(UnreachableError):
            async for _ in client:
                pass
    assert client.num_reconnects == 0 and len(server.pool.streams) == 1


@pytest.mark.parametrize("codec", ["raw", "png"])
async def test_pictures_may_be_sent_encoded_and_left_undecoded(echo_server, portrait, codec):
    server = await echo_server()
    async with Client(server.url, portrait=portrait, mode="lossless", codec=codec, decode=False) as client:
        captured_ms = now_ms() - 500
        assert await client.send_encoded(encode(picture(7), codec), captured_ms) == 0
        await client.end()
        last = [output async for output in client][-1]
    assert "rgb" not in vars(last) and np.array_equal(last.rgb, picture(7))
    assert last.message.capture_ms == pytest.approx(captured_ms) and last.delay_ms >= 500


async def test_the_place_in_line_is_told_while_waiting(scripted_server):
    places = []
    server = await scripted_server(saying(protocol.Queued(2, 40.0), protocol.Queued(1, 15.5), READY))
    async with Client(server.url, portrait="ada", on_queued=lambda *place: places.append(place)) as client:
        assert places == [(2, 40.0), (1, 15.5)]
        assert [event.detail["position"] for event in client.events] == [2, 1]


async def test_the_command_tells_of_waiting_recoveries_and_reconnects(scripted_server, clip, face, capsys):
    parts_ms = {"restart": 1200.0, "first_frame": 80.0}

    async def recover(socket):
        await say(socket, READY, protocol.Notice("recovering", "a process died"), protocol.Recovered(parts_ms))
        while not isinstance(protocol.parse_client(await socket.recv())[0], protocol.End):
            pass
        await say(socket, protocol.Ended(17, 15, 0, {"surplus": 2}))

    async def drain(socket):
        draining = protocol.Notice("draining", "this replica is being replaced")
        await say(socket, protocol.Queued(3, 62.0), READY, draining)
        await socket.wait_closed()

    figures = await run_client(arguments(await scripted_server(drain, recover), clip, face))
    assert figures["recoveries"] == [parts_ms] and figures["reconnects"] == 1
    assert figures["dropped"] == {"surplus": 2}
    told = capsys.readouterr().err
    assert "number 3 in line, about 62 s" in told and "recovering: a process died" in told


async def test_a_live_run_goes_on_after_its_connection_was_cut(echo_server, clip, face):
    server = await echo_server(chunk_s=0.01)
    async with Proxy(server.url) as proxy:
        more = ("--loop", "--seconds", "2", "--url", proxy.url)
        playing = asyncio.create_task(run_client(arguments(server, clip, face, *more)))
        while not server.pool.streams or server.pool.streams[0].num_calls < 5:
            await asyncio.sleep(0.01)
        proxy.cut()
        figures = await playing
    assert figures["reconnects"] == 1 and figures["frames_received"] > 15
    assert len(list(read_video(clip.with_name("out.mp4")))) == figures["frames_received"]


async def test_the_command_says_when_a_full_server_may_have_a_place(scripted_server, clip, face, capsys):
    busy = protocol.Error("busy", "all places are taken", fatal=True, retry_s=12.0)
    server = await scripted_server(saying(busy))
    argv = ["--portrait", str(face), "--driving", str(clip), "--out", str(clip.with_name("o.mp4"))]
    assert await asyncio.to_thread(main, [*argv, "--url", server.url]) == 1
    assert capsys.readouterr().err == "error: busy: all places are taken\nworth another try in 12 s\n"


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
