"""Whom the load generator kills and when it goes on; the processes are real, the house around them is made up here."""

import json
import os
import subprocess
import threading
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from serving.bench import kills as bench_kills
from serving.bench.kills import NothingToKill, choose, crew_of, is_whole, kinds, living, streams
from serving.bench.log import Kill, Output, Plan, SessionLog
from serving.bench.play import Film, Playing, play
from serving.bench.server import Server
from serving.codec import encode
from serving.line import Event


def member(name, stages, pid, **more):
    return {"name": name, "stages": stages, "pid": pid, "up": True, "is_spare": False} | more


def session(name, replica="r1", state="live", **members):
    return {"id": name, "replica": replica, "state": state, "members": members}


def house(**more):
    members = [
        member("front", ["motion", "reference"], 11),
        member("denoise-0", ["denoise"], 12),
        member("denoise-1", ["denoise"], 13),
        member("decode", ["decode"], 14),
    ]
    sessions = [
        session("a", denoise="denoise-0"),
        session("b", denoise="denoise-1", replica="r2"),
        session("c", denoise="denoise-1", replica="r2"),
    ]
    replicas = [{"id": "r1", "pid": 31, "num_sessions": 1}, {"id": "r2", "pid": 32, "num_sessions": 2}]
    usual = {"ready": True, "members": members, "replicas": replicas, "sessions": sessions, "manager": {"pid": 21}}
    return usual | more


def test_of_several_members_the_one_with_most_sessions_is_chosen():
    assert choose(house(), "denoise").pid == 13
    assert choose(house(), "motion").pid == choose(house(), "reference").pid == 11


def test_the_manager_and_the_replica_with_most_sessions_are_chosen_by_their_processes():
    assert choose(house(), "manager").pid == 21
    assert (choose(house(), "replica").pid, choose(house(), "replica").replica) == (32, "r2")


def test_who_is_not_there_cannot_be_chosen():
    down = house(members=[member("decode", ["decode"], None, up=False)], manager=None, replicas=[])
    for what in ("decode", "denoise", "manager", "replica"):
        with pytest.raises(NothingToKill, match=what):
            choose(down, what)


def test_a_session_whose_members_are_not_known_counts_for_none():
    unknown = house(sessions=[{"id": "a", "replica": "r1", "state": "live", "members": None}])
    assert choose(unknown, "denoise").pid in (12, 13)


def test_all_means_each_member_once_and_the_manager_and_a_replica():
    assert kinds(house(), "all") == ["motion", "denoise", "decode", "manager", "replica"]
    one_member = house(members=[member("all", ["motion", "reference", "denoise", "decode"], 11)])
    assert kinds(one_member, "all") == ["motion", "manager", "replica"]
    assert kinds(house(), "decode") == ["decode"]


def test_a_house_is_whole_when_everyone_is_up_and_every_session_live():
    assert is_whole(house(), crew_of(house()), ["a", "b", "c"])


@pytest.mark.parametrize(
    "broken",
    [
        house(ready=False),
        house(manager=None),
        house(manager={"pid": None}),
        house(replicas=house()["replicas"][:1]),
        house(members=house()["members"][:3]),
        house(members=[*house()["members"][:3], member("decode", ["decode"], 15, up=False)]),
        house(sessions=house()["sessions"][:2]),
        house(sessions=[*house()["sessions"][:2], session("c", state="recovering")]),
        living(house(), [13]),
        living(house(), [21]),
        living(house(), [32]),
    ],
)
def test_a_house_that_lacks_anyone_is_not_whole(broken):
    assert not is_whole(broken, crew_of(house()), ["a", "b", "c"])


def test_what_a_house_still_says_of_the_dead_does_not_count():
    replaced = house(replicas=[*house()["replicas"], {"id": "r3", "pid": 33, "num_sessions": 0}])
    moved = replaced | {"sessions": [*replaced["sessions"], session("b", "r3"), session("c", "r3")]}
    assert choose(living(replaced, [32]), "replica").pid == 31
    assert not is_whole(living(replaced, [32]), crew_of(house()), ["a", "b", "c"])
    assert is_whole(living(moved, [32]), crew_of(house()), ["a", "b", "c"])


def test_a_session_streams_when_it_got_a_frame_lately_since_the_kill_and_since_its_last_interruption():
    log = SessionLog([Output(5000.0, 1.0)], [Event(4000.0, "recovered", {})])
    assert streams(log, since_ms=3000.0, at_ms=5100.0)
    assert not streams(log, since_ms=5050.0, at_ms=5100.0)
    assert not streams(log, since_ms=3000.0, at_ms=9000.0)
    log.events.append(Event(5050.0, "recovering", ""))
    assert not streams(log, since_ms=3000.0, at_ms=5100.0)
    assert not streams(SessionLog(), since_ms=0.0, at_ms=0.0)


class House:
    """Processes that sleep, and a page that names them; who died is replaced when the page is asked for again."""

    def __init__(self, heals):
        self.heals = heals
        self.session_ids = []
        self.crew = {name: self.start() for name in ("members", "manager", "replicas")}

    def start(self):
        return subprocess.Popen(["sleep", "60"])

    def status(self):
        ups = {name: process.poll() is None for name, process in self.crew.items()}
        pids = {name: process.pid for name, process in self.crew.items()}
        for name in (name for name, up in ups.items() if not up and self.heals):
            self.crew[name] = self.start()
        return house(
            members=[member("all", ["motion", "reference", "denoise", "decode"], pids["members"], up=ups["members"])],
            manager={"pid": pids["manager"]} if ups["manager"] else None,
            replicas=[{"id": "r1", "pid": pids["replicas"], "num_sessions": 2}] if ups["replicas"] else [],
            sessions=[session(number) for number in self.session_ids],
        )


@contextmanager
def page_of(made_up):
    """The house's `/v1/status`, by HTTP."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(made_up.status()).encode())

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield Server(f"ws://127.0.0.1:{server.server_address[1]}/v1/stream", os.getpid())
    finally:
        server.shutdown()
        server.server_close()
        for process in made_up.crew.values():
            process.kill()
            process.wait()


async def kill(url, server, made_up, **plan):
    """Kills while two sessions stream from an echo; returns the log."""
    plan = Plan(2, 1.0, 50.0, **plan)

    async def during(playing: Playing) -> None:
        made_up.session_ids = [player.session_id for player in playing.players]
        told: list[Kill] = []
        await bench_kills.kill_in_turn(replace(playing, server=server), told.append, recover_s=2.0)
        assert told == playing.log.kills

    return await play(Server(url), plan, Film([grey_jpeg()], 25.0), during)


def grey_jpeg():
    return encode(np.full((64, 64, 3), 90, np.uint8), "jpeg")


async def test_every_kill_ends_a_real_process_and_the_next_one_waits_until_the_house_is_whole(echo_server):
    server, made_up = await echo_server(), House(heals=True)
    with page_of(made_up) as page:
        log = await kill(server.url, page, made_up, kill="all", num_kills=4)
    assert [each.what for each in log.kills] == ["motion", "manager", "replica", "motion"]
    assert len({each.pid for each in log.kills}) == 4
    assert [len(each.sessions) for each in log.kills] == [0, 0, 2, 0]
    assert log.error is None and log.num_not_recovered == 0
    assert not any(os.path.exists(f"/proc/{each.pid}") for each in log.kills)


async def test_a_house_that_does_not_heal_ends_the_killing_with_an_error(echo_server):
    server, made_up = await echo_server(), House(heals=False)
    with page_of(made_up) as page:
        log = await kill(server.url, page, made_up, kill="motion", num_kills=3)
    assert len(log.kills) == 1 and log.error.code == "not_whole"


async def test_a_process_of_somebody_else_is_never_killed(echo_server):
    server, made_up = await echo_server(), House(heals=True)
    with page_of(made_up) as page:
        elsewhere = replace(page, root_pid=made_up.crew["members"].pid)
        log = await kill(server.url, elsewhere, made_up, kill="manager", num_kills=1)
        assert made_up.crew["manager"].poll() is None
    assert not log.kills and log.error.code == "nothing_to_kill"
