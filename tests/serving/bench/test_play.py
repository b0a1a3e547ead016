"""Real sessions on a real socket, whose pipeline gives the driving frames back: their pictures are chosen here."""

import asyncio

import numpy as np
import pytest

from serving.bench.faces import distinct_faces
from serving.bench.log import Plan
from serving.bench.play import Film, load_film, play
from serving.bench.report import figures
from serving.bench.server import Server
from serving.codec import decode, encode
from stages.errors import BadVideo
from stages.portraits import BUNDLED_CLIP, load_portrait

FILM = Film([encode(load_portrait(distinct_faces(1)[0].data, 64), "jpeg")], 25.0)
"""The first session's portrait and nothing else."""


async def run(server, num_sessions=2, fps=50.0, until=40, **more):
    """Plays until every session has so many output frames, those of the transition too."""

    async def wait(playing):
        async with asyncio.timeout(20):
            while min(len(session.outputs) for session in playing.log.sessions) < until:
                await asyncio.sleep(0.01)

    return await play(Server(server.url), Plan(num_sessions, 1.0, fps), FILM, **{"during": wait} | more)


async def test_sessions_play_until_the_run_is_over_and_give_their_places_back(echo_server):
    server = await echo_server(chunk_s=0.02)
    log = await run(server)
    measured = figures(log)
    assert measured["seconds"] == pytest.approx((log.ended_ms - log.started_ms) / 1000, abs=0.1)
    assert len(measured["fps"]) == 2 and min(measured["fps"]) > 0
    assert 20 < measured["delay_ms"]["p50"] < 10_000
    assert measured["chunk_period_ms"] == pytest.approx(3000 / (measured["total_fps"] / 2), rel=0.01)
    assert measured["errors"] == [] and measured["sockets_closed_by_server"] == 0
    assert measured["server_rss_mb"]["start"] > 10
    await server.until_closed()


async def test_a_picture_of_another_sessions_portrait_is_seen(echo_server):
    # Both sessions get the first one's portrait back: the transition shows each its own, all that follows does not.
    log = await run(await echo_server())
    right, wrong = log.sessions
    assert right.num_wrong == 0 < right.num_checked
    assert wrong.num_wrong > 0
    assert figures(log)["frames_to_wrong_session"] == wrong.num_wrong


async def test_frames_are_sent_at_the_rate_that_is_asked_for_whatever_the_server_makes_of_them(echo_server):
    server = await echo_server(chunk_s=0.1)

    async def one_second(playing):
        await asyncio.sleep(1.0)

    dropped = [figures(await run(server, 1, fps, during=one_second))["dropped"] for fps in (20.0, 500.0)]
    assert sum(dropped[0].values()) < 20 and sum(dropped[1].values()) > 200


async def test_a_run_is_over_when_all_of_its_sessions_have_failed_and_names_them(echo_server):
    server = await echo_server(fail_after=1)
    async with asyncio.timeout(15):
        log = await run(server, until=10**9)
    assert [error["code"] for error in figures(log)["errors"]] == ["internal", "internal"]


def test_a_film_begins_again_at_its_end_and_keeps_the_videos_pace():
    film = Film([b"0", b"1", b"2", b"3"], 2.0)
    assert [film.at(time_s) for time_s in (0, 0.4, 0.5, 1.9, 2.0, 2.6)] == [b"0", b"0", b"1", b"3", b"0", b"1"]


def test_a_video_is_encoded_as_the_model_takes_it():
    film = load_film(BUNDLED_CLIP, 48)
    assert len(film.frames) == 300 and film.fps == pytest.approx(25, rel=0.01)
    assert decode(film.frames[0], "jpeg", 48, 48).shape == (48, 48, 3)
    assert (
        np.abs(decode(film.frames[0], "jpeg", 48, 48).astype(int) - decode(film.frames[40], "jpeg", 48, 48)).max() > 20
    )


def test_a_film_that_is_none_is_a_typed_error(tmp_path):
    with pytest.raises(BadVideo):
        load_film(tmp_path / "none.mp4", 48)
