"""The life of a session over a real socket, with a pipeline that echoes."""

import ast
import asyncio
import contextlib
import itertools
import json
import re
import struct
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from cluster.errors import PoolBusy
from serving import protocol
from serving.client import Client, ServerError, now_ms
from serving.codec import decode, encode
from serving.protocol import MAX_MESSAGE_BYTES, MAX_NUM_REFUSED, parse_server
from serving.settings import Settings
from stages.chunks import flush_indices
from stages.errors import UserError
from stages.portraits import load_portrait

FRAME = encode(np.full((32, 32, 3), 90, np.uint8), "jpeg")


def picture(number, side=64):
    return np.full((side, side, 3), number % 251 + 1, np.uint8)


def message(kind, payload=b"", **fields):
    header = json.dumps({"type": kind, **fields}).encode()
    return struct.pack(">I", len(header)) + header + payload


def hello(portrait, **fields):
    return message("hello", portrait, **{"protocol": 1, **fields})


def frame(seq, payload=FRAME):
    return message("frame", payload, seq=seq, capture_ms=0)


async def next_message(socket, *kinds):
    """The next message of one of these kinds."""
    async with asyncio.timeout(3):
        while True:
            received, _ = parse_server(await socket.recv())
            if received.type in kinds:
                return received


async def last_error(socket):
    """The error that ends the session, after which the socket is closed."""
    error = None
    try:
        async with asyncio.timeout(3):
            while True:
                received, _ = parse_server(await socket.recv())
                if received.type == "error":
                    error = received
    except ConnectionClosed:
        assert error is not None and error.fatal
        return error


async def play_all(client, num_frames):
    async def send():
        for number in range(num_frames):
            await client.send(picture(number))
        await client.end()

    async with asyncio.TaskGroup() as group:
        group.create_task(send())
        return [output async for output in client]


@pytest.mark.parametrize("num_frames", [1, 2, 3, 10, 25])
async def test_lossless_gives_every_frame_back_in_order_after_the_transition(echo_server, portrait, num_frames):
    server = await echo_server()
    async with Client(server.url, portrait=portrait, mode="lossless", codec="raw", seed=7) as client:
        outputs = await play_all(client, num_frames)
    seqs = [output.message.seq for output in outputs]
    assert seqs == [None] * 9 + list(range(num_frames))
    assert all(np.array_equal(output.rgb, picture(number)) for number, output in enumerate(outputs[9:]))
    assert [output.message.index for output in outputs] == list(range(len(outputs)))
    ended = client.ended
    assert (ended.frames_received, ended.frames_used, ended.frames_sent) == (num_frames, num_frames, num_frames + 9)
    assert ended.dropped == {}
    await server.until_closed()


async def test_the_server_pads_the_end_as_the_offline_tool_does(echo_server, portrait):
    server = await echo_server()
    async with Client(server.url, portrait=portrait, mode="lossless", codec="raw") as client:
        await play_all(client, 20)
    entered = [int(rgb[0, 0, 0]) - 1 for rgb in np.concatenate(server.pool.streams[0].entered)]
    assert entered == [*range(20), *flush_indices(20, 3, 4)]


@pytest.mark.parametrize("max_in_flight", [1, 3])
async def test_no_more_chunks_than_allowed_are_in_the_pipeline(echo_server, portrait, max_in_flight):
    server = await echo_server(Settings(max_chunks_in_flight=max_in_flight), chunk_s=0.005)
    async with Client(server.url, portrait=portrait, mode="lossless", codec="raw") as client:
        await play_all(client, 40)
    assert server.pool.max_in_flight == max_in_flight


async def test_a_live_camera_three_times_too_fast_sees_fresh_frames_and_counts_the_others(echo_server, portrait):
    server = await echo_server(chunk_s=0.06)
    delays, seqs = [], []

    async def send(client):
        for number in range(150):
            await client.send(picture(number))
            await asyncio.sleep(1 / 150)
        await client.end()

    async with (
        Client(server.url, portrait=portrait, codec="raw") as client,
        asyncio.TaskGroup() as group,
    ):
        group.create_task(send(client))
        async for output in client:
            if output.message.seq is not None:
                assert int(output.rgb[0, 0, 0]) == output.message.seq % 251 + 1
                assert output.message.server_ms >= 0
                delays.append(output.delay_ms)
                seqs.append(output.message.seq)
    ended = client.ended
    assert seqs == sorted(set(seqs)) and seqs[-1] >= 148
    assert ended.frames_received == 150 == ended.frames_used + sum(ended.dropped.values())
    assert ended.dropped["surplus"] > 60
    # Structural delay 3 periods, 2 in flight, 1 for pacing, 1 for the chunk itself, each 60 ms; nothing grows.
    assert max(delays) < 60 * 7 + 150
    assert np.median(delays[-20:]) < np.median(delays[:20]) + 100


async def test_live_output_is_spread_over_the_chunks_period(echo_server, portrait):
    server = await echo_server(chunk_s=0.09)
    times = []

    async def send(client):
        for number in range(60):
            await client.send(picture(number))
            await asyncio.sleep(1 / 50)
        await client.end()

    async with Client(server.url, portrait=portrait, codec="raw") as client, asyncio.TaskGroup() as group:
        group.create_task(send(client))
        async for output in client:
            times.append(output.received_ms)
    gaps = np.diff(times[9:-12])
    assert np.median(gaps) == pytest.approx(30, abs=10)


async def test_two_sessions_at_once_see_only_their_own_pictures(echo_server, portrait):
    server = await echo_server(chunk_s=0.002)

    async def one(offset):
        async with Client(server.url, portrait=portrait, mode="lossless", codec="raw") as client:
            for number in range(5):
                await client.send(picture(offset + number))
            await client.end()
            return [int(output.rgb[0, 0, 0]) for output in [o async for o in client] if output.message.seq is not None]

    first, second = await asyncio.gather(one(0), one(100))
    assert first == [1, 2, 3, 4, 5] and second == [101, 102, 103, 104, 105]


async def test_a_bundled_portrait_goes_by_its_name(echo_server):
    server = await echo_server()
    async with Client(server.url, portrait="ada") as client:
        assert client.ready.delay_frames == 9 and client.ready.size_px == 64


async def test_bye_ends_at_once_with_statistics(echo_server, portrait):
    server = await echo_server()
    async with connect(server.url) as socket:
        await socket.send(hello(portrait))
        await next_message(socket, "ready")
        await socket.send(frame(0))
        await socket.send(message("bye"))
        ended = await next_message(socket, "end")
        assert (ended.frames_received, ended.dropped) == (1, {"unused": 1})
    await server.until_closed()


async def test_ping_is_answered_with_both_clocks(echo_server, portrait):
    server = await echo_server()
    async with connect(server.url) as socket:
        await socket.send(hello(portrait))
        await socket.send(message("ping", client_ms=12.5))
        assert (await next_message(socket, "pong")).client_ms == 12.5


async def test_of_many_pings_some_are_answered(echo_server, portrait):
    server = await echo_server()
    async with connect(server.url) as socket:
        await socket.send(hello(portrait))
        await next_message(socket, "ready")
        for number in range(50):
            await socket.send(message("ping", client_ms=float(number)))
        await socket.send(message("bye"))
        kinds = [parse_server(await socket.recv())[0].type for _ in range(2)]
        while kinds[-1] != "end":
            kinds.append(parse_server(await socket.recv())[0].type)
    assert 1 <= kinds.count("pong") < 20


async def test_who_waits_for_the_model_is_told(echo_server, portrait, monkeypatch):
    monkeypatch.setattr("serving.session.NOTICE_S", 0.05)
    server = await echo_server(connect_s=0.2)
    async with connect(server.url) as socket:
        await socket.send(hello(portrait))
        assert (await next_message(socket, "notice", "ready")).code == "loading"
        await next_message(socket, "ready")


BLACK = encode(np.zeros((80, 80, 3), np.uint8), "png")
SMALL = encode(np.zeros((1, 1, 3), np.uint8), "png")


@pytest.mark.parametrize(
    ("first", "code"),
    [
        (frame(0), "not_hello"),
        (message("end"), "not_hello"),
        (message("hello", protocol=9), "bad_version"),
        (message("hello", protocol=1, codec="gif"), "bad_header"),
        (b"garbage that is no envelope", "bad_header"),
        ("garbage", "bad_header"),
        (b"\0" * (MAX_MESSAGE_BYTES + 1), "too_large"),
        (message("hello", protocol=1), "bad_portrait"),
        (message("hello", protocol=1, portrait="../driving"), "bad_portrait"),
        (hello(b"not an image"), "bad_portrait"),
        (hello(SMALL), "bad_portrait"),
        (hello(BLACK), "bad_portrait"),
    ],
)
async def test_a_wrong_first_message_ends_the_session_with_the_reason(echo_server, first, code):
    server = await echo_server()
    async with connect(server.url) as socket:
        await socket.send(first)
        error = await last_error(socket)
        assert error.code == code and len(error.message) > 15


@pytest.mark.parametrize(
    ("wrong", "code"),
    [
        (frame(3), "seq_backwards"),
        (frame(9, encode(np.zeros((40, 32, 3), np.uint8), "jpeg")), "frame_size_changed"),
        (frame(9, b"no picture"), "bad_frame"),
        (message("shown", count=5), "bad_receipt"),
        (message("hello", protocol=1), "unexpected"),
        (b"\0\0\0\x02xx", "bad_header"),
        ("{", "bad_header"),
    ],
)
async def test_a_live_session_survives_ten_wrong_messages_and_not_eleven(echo_server, portrait, wrong, code):
    server = await echo_server()
    async with connect(server.url) as socket:
        await socket.send(hello(portrait))
        await next_message(socket, "ready")
        await socket.send(frame(5))
        for number in range(MAX_NUM_REFUSED):
            await socket.send(wrong)
            error = await next_message(socket, "error")
            assert (error.code, error.fatal) == (code, False)
            if code in ("frame_size_changed", "bad_frame"):
                wrong = frame(10 + number, wrong[4 + struct.unpack(">I", wrong[:4])[0] :])
        await socket.send(message("ping", client_ms=1.0))
        await next_message(socket, "pong")
        await socket.send(wrong)
        assert (await last_error(socket)).code == code
    await server.until_closed()


async def test_a_lossless_session_ends_with_the_first_wrong_frame(echo_server, portrait):
    server = await echo_server()
    async with connect(server.url) as socket:
        await socket.send(hello(portrait, mode="lossless"))
        await next_message(socket, "ready")
        await socket.send(frame(0, b"no picture"))
        assert (await last_error(socket)).code == "bad_frame"


async def test_frames_that_turn_out_damaged_are_told_and_the_others_shown(echo_server, portrait):
    server = await echo_server()
    noise = encode(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8), "jpeg")
    async with connect(server.url) as socket:
        await socket.send(hello(portrait))
        await next_message(socket, "ready")
        for seq in range(3):
            await socket.send(frame(seq, noise[:-300] if seq == 1 else noise))
        error = await next_message(socket, "error")
        assert (error.code, error.fatal) == ("bad_frame", False)
        await socket.send(frame(3, noise))
        await socket.send(message("end"))
        seqs = [(await next_message(socket, "frame")).seq for _ in range(12)]
        assert seqs == [None] * 9 + [0, 2, 3]
        ended = await next_message(socket, "end")
        assert (ended.frames_used, ended.dropped) == (3, {"bad_frame": 1})


async def test_a_lossless_session_ends_with_the_first_damaged_frame(echo_server, portrait):
    server = await echo_server()
    noise = encode(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8), "jpeg")
    async with connect(server.url) as socket:
        await socket.send(hello(portrait, mode="lossless"))
        await next_message(socket, "ready")
        for seq in range(3):
            await socket.send(frame(seq, noise[:-300] if seq == 1 else noise))
        assert (await last_error(socket)).code == "bad_frame"
    await server.until_closed()


async def test_pictures_are_decoded_and_encoded_beside_the_event_loop_and_only_those_that_are_used(
    echo_server, portrait, monkeypatch
):
    threads = {"decode": [], "encode": []}

    def recording(name, function):
        def call(*args):
            threads[name].append(threading.current_thread())
            return function(*args)

        return call

    monkeypatch.setattr("serving.intake.decode", recording("decode", decode))
    monkeypatch.setattr("serving.session.encode", recording("encode", encode))
    server = await echo_server(chunk_s=0.06)
    async with Client(server.url, portrait=portrait) as client:
        for number in range(60):
            await client.send(picture(number))
            await asyncio.sleep(0.002)
        await client.end()
        async for _ in client:
            pass
    ended = client.ended
    assert len(threads["decode"]) == ended.frames_used < 40 and len(threads["encode"]) == ended.frames_sent
    assert threading.main_thread() not in threads["decode"] + threads["encode"]


async def test_portraits_are_decoded_one_at_a_time_even_when_their_clients_leave(echo_server, portrait, monkeypatch):
    busy, most = [], []

    def slow_load(*args):
        busy.append(1)
        most.append(len(busy))
        time.sleep(0.03)
        busy.pop()
        return load_portrait(*args)

    monkeypatch.setattr("serving.session.portraits.load_portrait", slow_load)
    server = await echo_server()
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(6):
            leaver = await stack.enter_async_context(connect(server.url))
            await leaver.send(hello(portrait))
            await asyncio.sleep(0.07)
            leaver.transport.abort()
        clients = [Client(server.url, portrait=portrait) for _ in range(5)]
        await asyncio.gather(*(stack.enter_async_context(client) for client in clients))
    assert set(most) == {1} and len(most) >= 6


async def test_a_lossless_client_that_sends_without_credit_is_ended(echo_server, portrait):
    server = await echo_server()
    async with connect(server.url) as socket:
        await socket.send(hello(portrait, mode="lossless"))
        ready = await next_message(socket, "ready")
        assert ready.credit == 6
        for seq in range(100):
            await socket.send(frame(seq))
        assert (await last_error(socket)).code == "no_credit"


async def test_frames_before_ready_are_refused(echo_server, portrait):
    server = await echo_server(open_s=0.2)
    async with connect(server.url) as socket:
        await socket.send(hello(portrait))
        await socket.send(frame(0))
        assert (await next_message(socket, "error", "ready")).code == "unexpected"
        await next_message(socket, "ready")


async def test_a_client_that_shows_nothing_gets_a_bounded_number_of_frames_and_is_ended(echo_server, portrait):
    server = await echo_server(Settings(idle_timeout_s=0.4))
    outputs = 0
    async with connect(server.url) as socket:
        await socket.send(hello(portrait))
        await next_message(socket, "ready")

        async def send():
            seq = 0
            while True:
                await socket.send(frame(seq))
                seq += 1
                await asyncio.sleep(0.01)

        sending = asyncio.create_task(send())
        with pytest.raises(ConnectionClosed):
            while True:
                received, _ = parse_server(await socket.recv())
                outputs += received.type == "frame"
                last = received
        sending.cancel()
    assert last.code == "stalled" and outputs == 4 * 3
    await server.until_closed()


async def test_a_silent_client_is_ended_before_and_after_hello(echo_server, portrait):
    server = await echo_server(Settings(idle_timeout_s=0.2, hello_timeout_s=0.1))
    async with connect(server.url) as socket:
        assert (await last_error(socket)).code == "idle"
    async with connect(server.url) as socket:
        await socket.send(hello(portrait))
        assert (await last_error(socket)).code == "idle"
    await server.until_closed()


async def test_a_flood_is_ended(echo_server, portrait):
    server = await echo_server(Settings(max_input_bytes_per_s=1_000_000))
    async with connect(server.url) as socket:
        await socket.send(hello(portrait))
        await next_message(socket, "ready")
        with pytest.raises(ConnectionClosed):
            for seq in range(3000):
                await socket.send(frame(seq))
            await socket.wait_closed()
            await socket.send("late")
        assert (await last_error(socket)).code == "flooding"
    await server.until_closed()


async def test_a_client_that_vanishes_frees_its_place(echo_server, portrait):
    server = await echo_server(Settings(max_sessions=1), chunk_s=0.05)
    for _ in range(5):
        async with connect(server.url) as socket:
            await socket.send(hello(portrait))
            await next_message(socket, "ready")
            for seq in range(20):
                await socket.send(frame(seq))
            socket.transport.abort()
        await server.until_closed()
        await asyncio.sleep(0.02)
    assert len(server.pool.streams) == 5


async def test_vanishing_while_the_session_opens_frees_its_place_too(echo_server, portrait):
    server = await echo_server(Settings(max_sessions=1), open_s=0.1)
    async with connect(server.url) as socket:
        await socket.send(hello(portrait))
        socket.transport.abort()
    await asyncio.sleep(0.05)
    async with connect(server.url) as socket:
        await socket.send(hello(portrait))
        await next_message(socket, "ready")


async def test_one_session_too_many_is_told_that_all_is_taken(echo_server, portrait):
    server = await echo_server(Settings(max_sessions=1))
    async with Client(server.url, portrait=portrait):
        with pytest.raises(ServerError) as refused:
            await Client(server.url, portrait=portrait).__aenter__()
        assert refused.value.code == "busy"


async def test_an_unexpected_failure_of_the_pipeline_ends_only_its_session(echo_server, portrait):
    server = await echo_server(fail_after=2)
    async with Client(server.url, portrait=portrait, mode="lossless", codec="raw") as client:
        with pytest.raises(ExceptionGroup) as failed:
            await play_all(client, 30)
        assert failed.value.exceptions[0].code == "internal"
    server.pool.fail_after = 10**9
    async with Client(server.url, portrait=portrait, mode="lossless", codec="raw") as client:
        assert len(await play_all(client, 3)) == 12


async def test_an_error_of_the_pipeline_keeps_its_code(echo_server, portrait):
    server = await echo_server(fail_after=0, failure=UserError("a member was lost: connect again", "member_lost"))
    async with connect(server.url) as socket:
        await socket.send(hello(portrait))
        await next_message(socket, "ready")
        for seq in range(3):
            await socket.send(frame(seq))
        error = await last_error(socket)
        assert (error.code, error.message) == ("member_lost", "a member was lost: connect again")


async def test_a_bystander_does_not_notice_bad_clients(echo_server, portrait):
    server = await echo_server(chunk_s=0.01)

    async def misbehave():
        for first in (b"junk", hello(b"no image"), message("hello", protocol=3)):
            async with connect(server.url) as socket:
                await socket.send(first)
                await last_error(socket)

    async with Client(server.url, portrait=portrait, mode="lossless", codec="raw") as client:
        bad = asyncio.create_task(misbehave())
        outputs = await play_all(client, 30)
        await bad
    assert [output.message.seq for output in outputs[9:]] == list(range(30))


def codes_in(path):
    """Codes of the errors that a module defines, and those given to a ProtocolError or an Error message."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ClassDef):
            assigned = [line for line in node.body if isinstance(line, ast.Assign) and line.targets[0].id == "code"]
            yield from (line.value.value for line in assigned)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("ProtocolError", "protocol.Error"):
            position = 1 if ast.unparse(node.func) == "ProtocolError" else 0
            given = node.args[position : position + 1]
            yield from (code.value for code in given if isinstance(code, ast.Constant))


NEVER_SENT = {"user_error", "bad_video", "bad_weights", "bad_config", "no_connection"}
"""What concerns files of the server and of the tools, and what the client says by itself."""


def test_every_code_that_a_client_can_meet_is_documented():
    root = Path(__file__).parents[2]
    paths = [*(root / "serving").glob("*.py"), root / "cluster" / "errors.py", root / "stages" / "errors.py"]
    codes = {code for path in paths for code in codes_in(path)} | protocol.ENDING_CODES
    assert {"frame_size_changed", "internal", "session_closed", "bad_portrait", "busy"} <= codes
    documented = set(re.findall(r"`([a-z_]+)`", (root / "docs" / "protocol.md").read_text()))
    assert codes - documented - NEVER_SENT == set()


async def test_capture_times_come_back_as_they_were(echo_server, portrait):
    server = await echo_server()
    captured = now_ms() - 1234.5
    async with Client(server.url, portrait=portrait, mode="lossless") as client:
        await client.send(picture(1), capture_ms=captured)
        await client.end()
        outputs = [output async for output in client]
    assert outputs[-1].message.capture_ms == pytest.approx(captured, abs=1e-6)
    assert outputs[-1].delay_ms > 1234


async def say(socket, portrait, **fields):
    """Says hello and returns ready."""
    await socket.send(hello(portrait, **fields))
    return await next_message(socket, "ready")


async def test_a_client_that_vanished_comes_back_with_its_token_and_gets_the_same_stream(echo_server, portrait):
    server = await echo_server()
    async with connect(server.url) as socket:
        first = await say(socket, portrait)
        socket.transport.abort()
    await server.until_closed()
    [stream] = server.pool.streams
    assert stream.parked and not stream.closed and not first.resumed
    async with connect(server.url) as socket:
        second = await say(socket, portrait, resume=first.token)
        assert (second.resumed, second.session, second.token) == (True, first.session, first.token)
        for seq in range(3):
            await socket.send(frame(seq))
        await next_message(socket, "frame")
    assert server.pool.streams == [stream]


async def test_a_token_that_nobody_knows_begins_a_new_session_under_another_token(echo_server, portrait):
    server = await echo_server()
    async with connect(server.url) as socket:
        ready = await say(socket, portrait, resume="guessed")
    assert not ready.resumed and ready.token not in (None, "guessed")


async def test_the_sessions_name_does_not_give_its_token_away(echo_server, portrait, caplog):
    caplog.set_level("INFO")
    server = await echo_server()
    async with connect(server.url) as socket:
        ready = await say(socket, portrait)
    await server.until_closed()
    assert ready.session in caplog.text and ready.token not in caplog.text


async def test_who_says_bye_or_is_lossless_leaves_no_session_behind(echo_server, portrait):
    server = await echo_server()
    async with connect(server.url) as socket:
        await say(socket, portrait)
        await socket.send('{"type": "bye"}')
        await next_message(socket, "end")
    async with connect(server.url) as socket:
        assert (await say(socket, portrait, mode="lossless")).token is None
        socket.transport.abort()
    await server.until_closed()
    assert [stream.parked for stream in server.pool.streams] == [False, False]
    async with connect(server.url) as socket:
        await socket.send(hello(portrait, mode="lossless", resume="token"))
        assert (await last_error(socket)).code == "unexpected"


async def test_who_waits_for_a_place_is_told_the_position_and_how_long(echo_server, portrait):
    server = await echo_server(line=[(2, 60.0), (1, 30.0)])
    async with connect(server.url) as socket:
        await socket.send(hello(portrait))
        told = [await next_message(socket, "queued", "ready") for _ in range(3)]
    assert [(one.position, one.estimate_s) for one in told[:2]] == [(2, 60.0), (1, 30.0)]
    assert told[2].type == "ready"


async def test_a_refusal_says_when_to_come_again(echo_server, portrait):
    server = await echo_server(refusal=PoolBusy("all places are taken", retry_s=7.5))
    async with connect(server.url) as socket:
        await socket.send(hello(portrait))
        error = await last_error(socket)
    assert (error.code, error.retry_s) == ("busy", 7.5)


async def test_who_brings_no_frames_gives_the_place_back_and_takes_it_again_with_the_next_ones(echo_server, portrait):
    server = await echo_server(Settings(idle_timeout_s=0.3), wake_s=0.2)
    async with connect(server.url) as socket:
        await say(socket, portrait)
        [stream] = server.pool.streams
        for seq in range(3):
            await socket.send(frame(seq))
        for _ in range(3):
            await next_message(socket, "frame")
        await socket.send('{"type": "shown", "count": 3}')
        async with asyncio.timeout(3):
            while not stream.is_idle:
                await socket.send('{"type": "ping", "client_ms": 1}')
                await asyncio.sleep(0.1)
        [session] = server.replica.sessions
        assert session.state == "idle"
        for seq in range(3, 6):
            await socket.send(frame(seq))
        await next_message(socket, "frame")
        assert not stream.is_idle and session.state == "live"


async def test_pings_without_frames_keep_a_session_only_for_so_long(echo_server, portrait):
    server = await echo_server(Settings(idle_timeout_s=0.3, pause_timeout_s=0.5))
    async with connect(server.url) as socket:
        await say(socket, portrait)

        async def ping():
            while True:
                await socket.send('{"type": "ping", "client_ms": 1}')
                await asyncio.sleep(0.1)

        pinging = asyncio.create_task(ping())
        error = await last_error(socket)
        pinging.cancel()
    assert error.code == "idle" and "no frames" in error.message
    assert server.pool.streams[0].is_idle
    await server.until_closed()


async def test_large_frames_are_decoded_for_a_share_of_the_time_only(echo_server, portrait):
    server = await echo_server()
    large = encode(np.full((2000, 2000, 3), 90, np.uint8), "jpeg")
    num_chunks = {}
    for name, payload in (("small", FRAME), ("large", large)):
        async with connect(server.url) as socket:
            await say(socket, portrait)
            until_s = asyncio.get_running_loop().time() + 1.0
            for seq in itertools.count():
                await socket.send(frame(seq, payload))
                await asyncio.sleep(0.01)
                if asyncio.get_running_loop().time() > until_s:
                    break
            num_chunks[name] = len(server.pool.streams[-1].entered)
    # Four chunks may be under way before the first receipt, which never comes here.
    assert num_chunks["small"] == 4 and 1 <= num_chunks["large"] < 4


async def test_who_vanishes_with_the_hello_costs_no_work(echo_server, portrait, monkeypatch):
    decoded = []
    monkeypatch.setattr("serving.session._load_portrait", lambda *args: decoded.append(args))
    server = await echo_server()
    for _ in range(5):
        async with connect(server.url) as socket:
            await socket.send(hello(portrait))
            socket.transport.abort()
    async with asyncio.timeout(3):
        while server.replica.sessions:
            await asyncio.sleep(0.01)
    assert decoded == [] and server.pool.streams == []


async def test_an_interruption_is_told_and_so_is_its_end(echo_server, portrait):
    server = await echo_server()
    async with connect(server.url) as socket:
        await say(socket, portrait)
        [session] = server.replica.sessions
        await session.recovering()
        assert (await next_message(socket, "notice")).code == "recovering"
        await session.recovered({"restart": 1.5, "first_frame": 2.0})
        assert (await next_message(socket, "recovered")).parts_ms == {"restart": 1.5, "first_frame": 2.0}


async def test_the_delay_from_capture_to_shown_is_known_by_the_clients_own_clock(echo_server, portrait):
    server = await echo_server()
    async with connect(server.url) as socket:
        await say(socket, portrait)
        for seq in range(15):
            await socket.send(message("frame", FRAME, seq=seq, capture_ms=1000 + seq))
            if seq % 3 == 2:
                await asyncio.sleep(0.1)
        for count in range(1, 13):
            shown = await next_message(socket, "frame")
            delay_ms = {} if shown.capture_ms is None else {"shown_ms": shown.capture_ms + 321}
            await socket.send(json.dumps({"type": "shown", "count": count, **delay_ms}))
        [session] = server.replica.sessions
        async with asyncio.timeout(3):
            while session.status("here")["delay_ms"]["p95"] is None:
                await asyncio.sleep(0.02)
        assert session.status("here")["delay_ms"] == {"p50": 321.0, "p95": 321.0}


async def test_without_the_time_of_showing_the_delay_comes_from_the_clocks_offset(echo_server, portrait):
    server = await echo_server()
    behind_ms = 5_000_000.0

    def client_ms():
        return time.time() * 1000 - behind_ms

    async with connect(server.url) as socket:
        await say(socket, portrait)
        await socket.send(json.dumps({"type": "ping", "client_ms": client_ms(), "rtt_ms": 0.5}))
        await next_message(socket, "pong")
        for seq in range(15):
            await socket.send(message("frame", FRAME, seq=seq, capture_ms=client_ms()))
            if seq % 3 == 2:
                await asyncio.sleep(0.1)
        for count in range(1, 13):
            await next_message(socket, "frame")
            await socket.send(json.dumps({"type": "shown", "count": count}))
        [session] = server.replica.sessions
        async with asyncio.timeout(3):
            while (delay_ms := session.status("here")["delay_ms"]["p50"]) is None:
                await asyncio.sleep(0.02)
        assert 100 < delay_ms < 2000


async def test_a_transport_that_the_server_closes_by_itself_is_a_client_that_has_gone(echo_server, portrait, caplog):
    server = await echo_server()
    async with connect(server.url) as socket:
        await say(socket, portrait)
        for _ in range(5):
            await socket.send("{}")
        await socket.send(b"\xff", text=True)
        await socket.wait_closed()
        await server.until_closed()
    assert "failed" not in caplog.text


async def test_who_vanishes_before_it_knows_its_token_leaves_no_session_behind(echo_server, portrait):
    server = await echo_server(open_s=0.2)
    async with connect(server.url) as socket:
        await socket.send(hello(portrait))
        await asyncio.sleep(0.1)
        socket.transport.abort()
    await asyncio.sleep(0.3)
    await server.until_closed()
    assert not any(stream.parked for stream in server.pool.streams)
