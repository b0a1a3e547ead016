"""Kills processes of a server again and again while sessions stream, and waits until all of them stream again.

Called by `serving.bench.runs`, for a server of its own only. Whom it kills, it reads in `/v1/status`.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from serving.bench import server as bench_server
from serving.bench.log import Kill, SessionLog
from serving.bench.machine import processes_of
from serving.bench.play import Playing
from serving.line import now_ms
from stages.errors import UserError

STAGES = ("motion", "reference", "denoise", "decode")
KILLABLE = (*STAGES, "manager", "replica", "all")
RECOVER_S = 90.0
POLL_S = 0.25
RECENT_MS = 3000.0
"""Who got a frame within this is streaming."""

House = Mapping[str, Any]
"""What `/v1/status` answers."""


class NothingToKill(UserError):
    """The process that was to be killed is not there."""

    code = "nothing_to_kill"


class NotWhole(UserError):
    """The server did not get whole again, so that nothing more is killed."""

    code = "not_whole"


@dataclass(frozen=True)
class Victim:
    """A process to kill."""

    what: str
    pid: int
    replica: str | None = None
    """Its id, of a replica."""


@dataclass(frozen=True)
class Crew:
    """How many processes a whole house has."""

    num_members: int
    num_replicas: int


def crew_of(house: House) -> Crew:
    """Of a house that is whole."""
    return Crew(len(house["members"]), len(house["replicas"]))


def kinds(house: House, kill: str) -> list[str]:
    """What to kill in turn: of `all` each member once, by a stage of its, and the manager and a replica."""
    if kill != "all":
        return [kill]
    by_pid = {choose(house, stage).pid: stage for stage in reversed(STAGES)}
    return [*(stage for stage in STAGES if stage in by_pid.values()), "manager", "replica"]


def choose(house: House, what: str) -> Victim:
    """The process for a stage, `manager` or `replica`; of several the one with most sessions. Raises NothingToKill."""
    if what == "manager":
        candidates = [(0, Victim(what, pid)) for pid in [(house["manager"] or {}).get("pid")] if pid]
    elif what == "replica":
        candidates = [(_num(r["num_sessions"]), Victim(what, r["pid"], r["id"])) for r in house["replicas"] if r["pid"]]
    else:
        hosts = [m for m in house["members"] if what in m["stages"] and m["up"] and m["pid"]]
        candidates = [(num_served(house, host, what), Victim(what, host["pid"])) for host in hosts]
    if not candidates:
        raise NothingToKill(f"the server has no process for {what} just now")
    return max(candidates, key=lambda candidate: candidate[0])[1]


def num_served(house: House, member: Mapping[str, Any], stage: str) -> int:
    """The sessions whose stage lives on a member."""
    return sum((session["members"] or {}).get(stage) == member["name"] for session in house["sessions"])


def _num(count: int | None) -> int:
    return count or 0


def living(house: House, dead_pids: Collection[int]) -> House:
    """The house without what it still says of processes that were killed: it need not have noticed yet."""
    gone = {replica["id"] for replica in house["replicas"] if replica["pid"] in dead_pids}
    manager = house["manager"] or {}
    return {
        **house,
        "members": [member | {"up": member["up"] and member["pid"] not in dead_pids} for member in house["members"]],
        "manager": None if manager.get("pid") in dead_pids else house["manager"],
        "replicas": [replica for replica in house["replicas"] if replica["id"] not in gone],
        "sessions": [session for session in house["sessions"] if session["replica"] not in gone],
    }


def is_whole(house: House, crew: Crew, session_ids: Collection[str]) -> bool:
    """Whether every process is there and every one of these sessions is live."""
    live = {session["id"] for session in house["sessions"] if session["state"] == "live"}
    return (
        bool(house["ready"] and (house["manager"] or {}).get("pid"))
        and all(member["up"] for member in house["members"])
        and len(house["members"]) >= crew.num_members
        and len(house["replicas"]) >= crew.num_replicas
        and live >= set(session_ids)
    )


def streams(session: SessionLog, since_ms: float, at_ms: float) -> bool:
    """Whether a session gets frames: one since `since_ms` and since it was last interrupted, and one lately."""
    last_ms = session.outputs[-1].received_ms if session.outputs else float("-inf")
    event_ms = session.events[-1].at_ms if session.events else float("-inf")
    return last_ms > max(since_ms, event_ms, at_ms - RECENT_MS)


async def kill_in_turn(playing: Playing, on_kill: Callable[[Kill], None], recover_s: float = RECOVER_S) -> None:
    """Makes all kills of the plan, each when everything is whole and every session streams.

    Each has `recover_s` to be over. What makes an end of it all before stands in the log.
    """
    plan, log = playing.log.plan, playing.log
    assert plan.kill is not None, "only a plan with a kill comes here"
    turns: list[str] = []
    crew = Crew(0, 0)
    for number in range(plan.num_kills):
        house = await _whole_again(playing, crew, now_ms(), recover_s)
        if house is None:
            log.error = NotWhole(f"the server was not whole {recover_s:.0f} s after kill {number}: no more were made")
            return
        try:
            crew, turns = crew_of(house) if number == 0 else crew, turns or kinds(house, plan.kill)
            kill = strike(playing, house, choose(house, turns[number % len(turns)]))
        except NothingToKill as error:
            log.error = error
            return
        log.kills.append(kill)
        if await _whole_again(playing, crew, kill.at_ms, recover_s) is None:
            log.num_not_recovered += sum(not streams(one, kill.at_ms, now_ms()) for one in log.sessions)
        on_kill(kill)


def strike(playing: Playing, house: House, victim: Victim) -> Kill:
    """SIGKILL, to a process of the benchmark's own server and to no other. Raises NothingToKill."""
    root_pid = playing.server.root_pid
    if root_pid is None or victim.pid not in {process.pid for process in processes_of(root_pid)}:
        raise NothingToKill(f"process {victim.pid} ({victim.what}) is not below this server")
    held = {s["id"] for s in house["sessions"] if victim.replica is not None and s["replica"] == victim.replica}
    numbers = frozenset(number for number, player in enumerate(playing.players) if player.session_id in held)
    kill = Kill(victim.what, victim.pid, now_ms(), numbers)
    os.kill(victim.pid, signal.SIGKILL)
    return kill


async def _whole_again(playing: Playing, crew: Crew, since_ms: float, recover_s: float) -> House | None:
    """The house when it is whole and every session that has not ended streams; None when that takes too long."""
    dead_pids = {kill.pid for kill in playing.log.kills}
    deadline_s = time.monotonic() + recover_s
    while time.monotonic() < deadline_s:
        await asyncio.sleep(POLL_S)
        alive = [player for player in playing.players if player.log.error is None]
        if all(streams(player.log, since_ms, now_ms()) for player in alive):
            told = await asyncio.to_thread(bench_server.status, playing.server)
            house = told and living(told, dead_pids)
            if house and is_whole(house, crew, [player.session_id for player in alive]):
                return house
    return None
