import asyncio
import time

import numpy as np
import pytest
from websockets.asyncio.server import serve

from serving import protocol
from serving.client import Client
from serving.fuzz.bad_clients import KINDS, MAX_GARBAGE_BYTES, garbage, prepare, run_bad_clients
from serving.fuzz.parsers import CLIENT_CODES
from serving.settings import Settings
from stages.errors import UserError

SETTINGS = Settings(hello_timeout_s=0.5, idle_timeout_s=20, resume_s=0.1)
ANSWERS = CLIENT_CODES | {"attempts", "held", "left"}


async def film(client, outputs):
    """A good client's camera and screen."""

    async def send():
        while True:
            await client.send(np.full((64, 64, 3), 128, np.uint8))
            await asyncio.sleep(1 / 25)

    sending = asyncio.create_task(send())
    try:
        async for output in client:
            outputs.append(output)
    finally:
        sending.cancel()


async def test_ten_bad_clients_get_their_answers_and_a_good_one_keeps_its_frames(echo_server, portrait):
    prepare()
    server = await echo_server(SETTINGS, chunk_s=0.05)
    outputs = []
    async with Client(server.url, portrait=portrait, reconnect_s=0.0) as client:
        filming = asyncio.create_task(film(client, outputs))
        started_s = time.monotonic()
        counts = await run_bad_clients(server.url, seconds=4.0)
        assert 4.0 <= time.monotonic() - started_s < 10.0
        num_beside, num_after = len(outputs), 0
        async with asyncio.timeout(10):
            while num_after < 3:
                await asyncio.sleep(0.05)
                num_after = len(outputs) - num_beside
        assert not filming.done() and num_beside > 3
        filming.cancel()
    assert all(counts[f"{kind} attempts"] >= 1 for kind in KINDS)
    assert {name.split()[1] for name in counts} <= ANSWERS
    assert counts["silent idle"] >= 1 and counts["reconnect_storm attempts"] <= 4 * 20 + 1
    for kind in KINDS:
        answers = sum(num for name, num in counts.items() if name.startswith(f"{kind} "))
        assert answers == 2 * counts[f"{kind} attempts"]


async def test_fewer_are_the_first_kinds_and_more_begin_again(echo_server):
    server = await echo_server(SETTINGS)
    first = next(iter(KINDS))
    assert set(await run_bad_clients(server.url, 0.5, num=1)) == {f"{first} attempts", f"{first} held"}
    counts = await run_bad_clients(server.url, 0.5, num=len(KINDS) + 1)
    assert counts[f"{first} attempts"] == 2


async def test_who_is_refused_a_place_is_counted_by_the_code():
    async def refuse(socket):
        async for _ in socket:
            await socket.send(protocol.pack(protocol.Error("busy", "all places are taken", fatal=True)))
            return

    async with serve(refuse, "127.0.0.1", 0) as server:
        counts = await run_bad_clients(f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}/", 0.5, num=3)
    assert counts["flood busy"] == counts["slow_reader busy"] == 1 and counts["silent held"] == 1


async def test_where_there_is_no_server_they_do_not_try_without_pause():
    counts = await run_bad_clients("ws://127.0.0.1:9/v1/stream", 0.3)
    assert counts["flood unreachable"] == counts["flood attempts"] == 1
    assert counts["reconnect_storm attempts"] < 10


async def test_they_only_go_to_this_machine():
    with pytest.raises(UserError, match="allow-remote"):
        await run_bad_clients("ws://example.com/v1/stream", 0.1)


def test_garbage_is_never_a_flood():
    assert all(len(message.data) <= MAX_GARBAGE_BYTES for message in garbage())
    assert len(garbage()) == 300
