"""One more than there are places, against a real socket whose pipeline echoes and lets so many in."""

import asyncio

import numpy as np
import pytest

from serving.bench.log import Log, Newcomer, Output, Plan, SessionLog
from serving.bench.newcomer import play_with_one_more
from serving.bench.play import Film, NotOpened
from serving.bench.report import figures
from serving.bench.server import Server
from serving.codec import encode

FILM = Film([encode(np.full((64, 64, 3), 90, np.uint8), "jpeg")], 25.0)


async def nothing(playing):
    await asyncio.sleep(0.5)


async def until_it_is_heard(playing):
    """However long that takes where other tests keep the processors busy."""
    newcomer = playing.log.newcomer
    async with asyncio.timeout(30):
        while newcomer.waiting is None and newcomer.ready_ms is None:
            await asyncio.sleep(0.02)


async def one_more(server):
    plan = Plan(2, 1.0, 50.0, has_newcomer=True)
    return await play_with_one_more(Server(server.url), plan, FILM, nothing, until_it_is_heard)


async def test_it_waits_while_all_are_there_and_gets_a_place_when_they_leave(echo_server):
    server = await echo_server(chunk_s=0.02, places=2)
    log = await one_more(server)
    assert log.newcomer.waiting == (1, 9.0) and log.error is None
    assert log.started_ms < log.newcomer.came_ms < log.ended_ms < log.newcomer.ready_ms
    await server.until_closed()


async def test_one_that_is_let_in_at_once_is_an_error_of_the_run(echo_server):
    log = await one_more(await echo_server(chunk_s=0.02, places=3))
    assert log.newcomer.waiting is None and log.error.code == "not_queued"


async def test_one_that_gets_no_place_at_all_is_a_typed_error(echo_server, monkeypatch):
    monkeypatch.setattr("serving.bench.newcomer.PLACE_S", 0.3)
    server = await echo_server(chunk_s=0.02, places=2)

    async def close_the_door(playing):
        server.pool.places = 0

    with pytest.raises(NotOpened, match="no place"):
        await play_with_one_more(Server(server.url), Plan(2, 1.0, 50.0), FILM, close_the_door, nothing)


def test_what_it_did_to_the_others_is_told_for_each_of_them():
    before = [Output(1000.0 + 100 * number, 500.0) for number in range(40)]
    after = [Output(5000.0 + 100 * number, 600.0) for number in range(40)]
    log = Log(Plan(1, 9.0, 25.0), 4, 0.0, 9000.0, [SessionLog(before + after)])
    log.newcomer = Newcomer(came_ms=5000.0, waiting=(1, 150.0), ready_ms=9800.0)
    told = figures(log)["newcomer"]
    assert told["p95_ms"] == [{"before": 500.0, "after": 600.0, "ratio": 1.2}]
    assert (told["position"], told["estimate_s"], told["ready_after_leave_ms"]) == (1, 150.0, 800.0)
