import re
from collections import Counter
from pathlib import Path

from websockets.asyncio.server import serve

from serving import protocol
from serving.fuzz.live import NUM_WORDS, Heard, converse, run_live
from serving.fuzz.parsers import CLIENT_CODES


def test_every_code_that_is_expected_is_documented():
    text = (Path(__file__).parents[3] / "docs" / "protocol.md").read_text()
    assert CLIENT_CODES - set(re.findall(r"^\| `([a-z_]+)`", text, re.MULTILINE)) == set()


async def test_a_server_answers_broken_messages_with_typed_errors_and_a_good_client_keeps_its_frames(echo_server):
    server = await echo_server(chunk_s=0.05)
    figures, failures = await run_live(server.url, 400, seed=2)
    assert failures == []
    assert figures["messages"] >= 400 and figures["good_frames"] > 10
    assert {"ready", "frame", "end", "bad_header", "not_hello", "unexpected"} <= figures["counts"].keys()
    await server.until_closed()


async def test_a_conversation_is_held_again_with_the_same_messages(echo_server):
    server = await echo_server()
    told = []
    for _ in range(2):
        heard = Heard()
        await converse(server.url, 2, 1, heard)
        assert 0 < heard.num_sent <= NUM_WORDS and heard.failures == []
        told.append(heard.counts)
    assert told[0] == told[1]


async def fails(answer):
    """What is noted of conversations with a server that answers the first message so, and closes."""

    async def handle(socket):
        await socket.recv()
        await answer(socket)

    heard = Heard()
    async with serve(handle, "127.0.0.1", 0, max_size=None) as server:
        port = server.sockets[0].getsockname()[1]
        await converse(f"ws://127.0.0.1:{port}/", 2, 0, heard)
    return heard


async def test_a_server_that_says_internal_has_failed():
    async def answer(socket):
        await socket.send(protocol.pack(protocol.Error("internal", "it broke", fatal=True)))

    heard = await fails(answer)
    assert "the server said internal: it broke" in heard.failures[0].what
    assert heard.counts == Counter(internal=1)


async def test_a_server_that_closes_without_a_reason_has_failed():
    async def answer(socket):
        await socket.close()

    assert "without a reason (code 1000)" in (await fails(answer)).failures[0].what


async def test_what_a_server_said_last_is_read_though_it_has_closed_already():
    async def answer(socket):
        output = protocol.OutputFrame(
            index=0,
            seq=None,
            capture_ms=None,
            no_face=False,
            server_ms=None,
            stage_ms={},
            dropped={},
            width=8,
            height=8,
        )
        await socket.send(protocol.pack(output, b"picture"))
        await socket.send(protocol.pack(protocol.Ended(0, 0, 1, {})))
        await socket.close()

    heard = await fails(answer)
    assert heard.failures == [] and heard.counts == {"frame": 1, "end": 1}


async def test_a_server_that_closes_as_the_transport_does_has_said_why():
    async def answer(socket):
        await socket.close(1007, "no UTF-8")

    heard = await fails(answer)
    assert heard.failures == [] and heard.counts == {"closed 1007": 1}


async def test_a_server_that_does_not_answer_has_failed(monkeypatch):
    monkeypatch.setattr("serving.fuzz.live.ANSWER_S", 0.3)

    async def answer(socket):
        async for _ in socket:
            pass

    assert "no end came" in (await fails(answer)).failures[0].what


async def test_a_server_that_is_not_there_is_noted():
    heard = Heard()
    await converse("ws://127.0.0.1:9/", 2, 0, heard)
    assert len(heard.failures) == 1
