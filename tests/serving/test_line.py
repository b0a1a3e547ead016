"""One connection, and a lasting line of several, against a socket that says what the real server says in trouble."""

import asyncio
import time

import pytest

from serving import line, protocol
from serving.line import LastingLine, ServerError, UnreachableError, open_line
from serving.protocol import parse_client

from .conftest import say, saying

HELLO = protocol.Hello(protocol.PROTOCOL)
QUEUED = protocol.Queued(2, 40.0)
DRAINING = protocol.Notice("draining", "this replica is being replaced")
MOVED = protocol.Error("session_moved", "another connection has taken over", fatal=True)


def ready(token="token-1", resumed=False):
    return protocol.Ready("s", 64, 3, 4, 9, 30.0, 0, 2**22, 10**7, 30.0, token=token, resumed=resumed)


def output(index):
    return protocol.OutputFrame(index, index, 0.0, False, 0.0, {}, {}, 64, 64)


def breaking_after(*messages):
    async def handle(socket):
        await say(socket, *messages)
        socket.transport.close()

    return handle


async def lasting_line(server, reconnect_s=5.0, remarks=None):
    lasting = LastingLine(server.url, HELLO, b"face", reconnect_s, (remarks if remarks is not None else []).append)
    await lasting.open()
    return lasting


async def indices(lasting, num):
    """Of the next output frames."""
    found = []
    while len(found) < num:
        _, message, _ = await lasting.receive()
        found += [message.index] if isinstance(message, protocol.OutputFrame) else []
    return found


def names(lasting):
    return [event.name for event in lasting.events]


async def test_what_comes_before_ready_is_passed_on(scripted_server):
    loading = protocol.Notice("loading", "the weights are being loaded")
    server = await scripted_server(saying(loading, QUEUED, ready()))
    remarks = []
    opened = await open_line(server.url, HELLO, b"face", remarks.append)
    await opened.close()
    assert remarks == [loading, QUEUED] and opened.ready == ready()
    assert server.hellos == [HELLO] and server.portrait_files == [b"face"]


async def test_a_refusal_says_when_to_try_again_and_leaves_no_connection(scripted_server):
    has_left = asyncio.Event()

    async def refuse(socket):
        await say(socket, protocol.Error("busy", "all places are taken", fatal=True, retry_s=12.5))
        await socket.wait_closed()
        has_left.set()

    server = await scripted_server(refuse)
    with pytest.raises(ServerError) as refused:
        await open_line(server.url, HELLO, b"", print)
    assert (refused.value.code, refused.value.retry_s) == ("busy", 12.5)
    async with asyncio.timeout(3):
        await has_left.wait()


async def test_a_server_that_hangs_up_before_ready_is_unreachable(scripted_server):
    server = await scripted_server(breaking_after(QUEUED))
    with pytest.raises(UnreachableError, match="closed the connection"):
        await open_line(server.url, HELLO, b"", print)


async def test_sending_on_a_closed_line_is_no_error(scripted_server):
    server = await scripted_server(breaking_after(ready()))
    opened = await open_line(server.url, HELLO, b"", print)
    with pytest.raises(UnreachableError):
        await opened.receive()
    assert await opened.send(protocol.End()) is False


async def test_a_broken_connection_is_followed_by_one_with_the_last_token(scripted_server):
    server = await scripted_server(
        breaking_after(ready("token-1"), output(0)),
        breaking_after(ready("token-2", resumed=True), output(1)),
        saying(ready("token-3"), output(2)),
    )
    lasting = await lasting_line(server)
    assert await indices(lasting, 3) == [0, 1, 2]
    await lasting.close()
    assert [hello.resume for hello in server.hellos] == [None, "token-1", "token-2"]
    assert server.portrait_files == [b"face"] * 3
    assert names(lasting) == ["lost", "reconnected", "lost", "reconnected"] and lasting.num_reconnects == 2
    assert [event.detail for event in lasting.events if event.name == "reconnected"] == [
        {"resumed": True},
        {"resumed": False},
    ]
    assert lasting.ready.token == "token-3"


async def test_a_connection_whose_replica_drains_is_read_and_sent_on_until_the_next_is_ready(scripted_server):
    may_be_ready, heard_on_old, heard_on_new = asyncio.Event(), [], []

    async def hear(socket, heard):
        async for data in socket:
            heard.append(parse_client(data)[0].type)

    async def drain(socket):
        await say(socket, ready("token-1"), output(0), DRAINING, output(1))
        await hear(socket, heard_on_old)

    async def follow(socket):
        await may_be_ready.wait()
        await say(socket, ready("token-2", resumed=True), output(2))
        await hear(socket, heard_on_new)

    server = await scripted_server(drain, follow)
    lasting = await lasting_line(server)
    assert await indices(lasting, 2) == [0, 1]
    while len(server.hellos) < 2:
        await asyncio.sleep(0.01)
    assert await lasting.send(protocol.DrivingFrame(0, 0.0))
    may_be_ready.set()
    assert await indices(lasting, 1) == [2]
    assert await lasting.send(protocol.DrivingFrame(1, 0.0))
    await lasting.close()
    await asyncio.sleep(0.05)
    assert heard_on_old == ["frame"] and heard_on_new == ["frame", "bye"]
    assert names(lasting) == ["draining", "reconnected"] and server.hellos[1].resume == "token-1"


async def test_that_the_next_connection_has_taken_the_session_over_is_no_error(scripted_server):
    is_called = asyncio.Event()

    async def drain_and_end(socket):
        await say(socket, ready(), DRAINING)
        await is_called.wait()
        await say(socket, output(0), MOVED)

    async def follow(socket):
        is_called.set()
        await asyncio.sleep(0.1)
        await say(socket, ready("token-2"), output(1))
        await socket.wait_closed()

    lasting = await lasting_line(await scripted_server(drain_and_end, follow))
    assert await indices(lasting, 2) == [0, 1]
    await lasting.close()
    assert names(lasting) == ["draining", "reconnected"]


async def test_a_session_that_somebody_else_has_taken_over_is_an_error(scripted_server):
    lasting = await lasting_line(await scripted_server(saying(ready(), MOVED)))
    with pytest.raises(ServerError) as moved:
        await indices(lasting, 1)
    assert moved.value.code == "session_moved"
    await lasting.close()


@pytest.mark.parametrize("last", [DRAINING, QUEUED])
async def test_without_time_to_connect_again_a_line_is_one_connection(scripted_server, last):
    server = await scripted_server(breaking_after(ready(), output(0), last))
    lasting = await lasting_line(server, reconnect_s=0)
    with pytest.raises(UnreachableError):
        await indices(lasting, 2)
    await lasting.close()
    assert len(server.hellos) == 1


async def test_the_last_tries_error_is_raised_when_the_time_is_over(scripted_server):
    server = await scripted_server(breaking_after(ready(), output(0)), breaking_after())
    lasting = await lasting_line(server, reconnect_s=1.0)
    began_s = time.monotonic()
    with pytest.raises(UnreachableError):
        await indices(lasting, 2)
    # Tries after 0.1, 0.3 and 0.7 s; the next one would come after 1.5 s.
    assert 0.6 < time.monotonic() - began_s < 1.4
    assert len(server.hellos) == 4
    await lasting.close()


async def test_a_connection_that_was_silent_for_long_before_it_broke_is_followed_too(scripted_server):
    async def fall_silent(socket):
        await say(socket, ready())
        await asyncio.sleep(0.6)
        socket.transport.close()

    lasting = await lasting_line(await scripted_server(fall_silent, saying(ready(), output(0))), reconnect_s=0.4)
    assert await indices(lasting, 1) == [0]
    await lasting.close()


async def test_connections_that_break_without_a_sign_of_life_do_not_go_on_for_ever(scripted_server):
    server = await scripted_server(breaking_after(ready()))
    lasting = await lasting_line(server, reconnect_s=0.5)
    with pytest.raises(UnreachableError):
        await indices(lasting, 1)
    assert 3 <= len(server.hellos) <= 7
    await lasting.close()


async def test_a_refusal_is_tried_again_only_when_the_server_says_when(scripted_server):
    def refusing(retry_s):
        return saying(protocol.Error("busy", "all places are taken", fatal=True, retry_s=retry_s))

    server = await scripted_server(
        breaking_after(ready()), refusing(0.3), breaking_after(ready(), output(0)), refusing(None)
    )
    lasting = await lasting_line(server)
    began_s = time.monotonic()
    assert await indices(lasting, 1) == [0]
    assert time.monotonic() - began_s > 0.35
    with pytest.raises(ServerError, match="places"):
        await indices(lasting, 1)
    await lasting.close()
    assert len(server.hellos) == 4


async def test_an_end_is_said_again_to_the_next_connection(scripted_server):
    async def end(socket):
        await say(socket, ready("token-2"))
        while parse_client(await socket.recv())[0].type != "end":
            pass
        await say(socket, protocol.Ended(0, 0, 0, {}))

    lasting = await lasting_line(await scripted_server(breaking_after(ready()), end))
    await lasting.end()
    async with asyncio.timeout(3):
        assert isinstance((await lasting.receive())[1], protocol.Ended)
    await lasting.close()


async def test_pings_tell_how_long_the_last_one_took(scripted_server, monkeypatch):
    monkeypatch.setattr(line, "PING_S", 0.05)
    rtts_ms = []

    async def answer(socket):
        await say(socket, ready())
        while not any(rtts_ms):
            ping, _ = parse_client(await socket.recv())
            rtts_ms.append(ping.rtt_ms)
            await asyncio.sleep(0.03)
            await say(socket, protocol.Pong(ping.client_ms, 0.0))
        await say(socket, output(0))

    lasting = await lasting_line(await scripted_server(answer))
    await indices(lasting, 1)
    await lasting.close()
    assert rtts_ms[0] is None and 30 <= rtts_ms[-1] < 1000


async def test_waiting_and_recovering_are_noted_with_their_figures(scripted_server):
    recovering = protocol.Notice("recovering", "a process died")
    recovered = protocol.Recovered({"restart": 1200.0, "weights": 300.0})
    remarks = []
    server = await scripted_server(saying(QUEUED, ready(), recovering, recovered, output(0)))
    lasting = await lasting_line(server, remarks=remarks)
    await indices(lasting, 1)
    await lasting.close()
    assert [event[1:] for event in lasting.events] == [
        ("queued", {"position": 2, "estimate_s": 40.0}),
        ("recovering", "a process died"),
        ("recovered", {"restart": 1200.0, "weights": 300.0}),
    ]
    assert remarks == [QUEUED]
    assert sorted(event.at_ms for event in lasting.events) == [event.at_ms for event in lasting.events]


async def test_closing_ends_the_search_for_a_connection_and_says_bye_to_it(scripted_server):
    heard = []

    async def never_ready(socket):
        heard.extend([parse_client(data)[0].type async for data in socket])
        has_left.set()

    has_left = asyncio.Event()
    server = await scripted_server(saying(ready(), DRAINING), never_ready)
    lasting = await lasting_line(server)
    await lasting.receive()
    while len(server.hellos) < 2:
        await asyncio.sleep(0.01)
    await lasting.close()
    async with asyncio.timeout(3):
        await has_left.wait()
    assert heard == ["bye"]


@pytest.mark.parametrize("is_resumed", [True, False])
async def test_a_session_that_did_not_move_is_left_with_a_bye(scripted_server, is_resumed):
    heard = []

    async def drain(socket):
        await say(socket, ready(), DRAINING)
        heard.extend([parse_client(data)[0].type async for data in socket])

    server = await scripted_server(drain, saying(ready("token-2", is_resumed), output(0)))
    lasting = await lasting_line(server)
    await indices(lasting, 1)
    await lasting.close()
    assert heard == ([] if is_resumed else ["bye"])
