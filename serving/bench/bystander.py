"""Whether a death cuts those who had nothing to do with it: `python -m serving.bench.bystander [--haproxy]`.

Starts a server of its own with two ingress replicas, lets sessions stream on both, kills one replica with SIGKILL, and
goes on for 150 s. The other's sessions should notice nothing, also later: Serve's HAProxy starts anew whenever a
replica comes or goes, and by default cuts the sockets of its predecessor 120 s later (docs/hosting.md). No Ray, no
torch in this process.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import math
import signal
import sys
import time
from collections.abc import Sequence
from typing import Any

from serving.bench import kills as bench_kills
from serving.bench import report as bench_report
from serving.bench import server as bench_server
from serving.bench.log import Log, Plan, SessionLog
from serving.bench.machine import machine
from serving.bench.play import Playing, load_film, play
from serving.bench.table import columns, machine_line, number
from serving.client import Client
from stages.errors import UserError
from stages.portraits import BUNDLED_CLIP, bundled_portraits

SETTINGS = {"num_replicas": 2, "target_fps": 1}
"""So low a rate, that everybody is admitted."""
NUM_SESSIONS = 3
"""The proxies spread them over both replicas."""
BEFORE_S = 20.0
COMPARED_S = 10.0
"""What comes so long before the kill is compared with what comes after it; before that a session's start is slow."""
REPLACED_S = 60.0
POLL_S = 0.25
SILENT_S = 10.0
"""Who got no frame for so long at the end does not stream any more."""
COLUMNS = ("session", "fps before", "after", "longest gap before", "after", "last frame", "socket closed", "next frame")


class NoBystander(UserError):
    """All sessions were on the replica that was killed, or none was."""

    code = "no_bystander"


class Bystanding:
    """The kill in the middle of a run."""

    def __init__(self, seconds: float):
        self._seconds = seconds
        self.replaced_s: float | None = None
        """From the kill until another replica was there; None: not within REPLACED_S."""

    async def __call__(self, playing: Playing) -> None:
        """Waits, kills the replica with most sessions, and waits. Raises NoBystander and NothingToKill."""
        await asyncio.sleep(BEFORE_S)
        house = await asyncio.to_thread(bench_server.status, playing.server) or {}
        kill = bench_kills.strike(playing, house, bench_kills.choose(house, "replica"))
        playing.log.kills.append(kill)
        if not 0 < len(kill.sessions) < len(playing.players):
            num_hit, num = len(kill.sessions), len(playing.players)
            raise NoBystander(f"{num_hit} of {num} sessions were on the replica that was killed: try again")
        enough = asyncio.create_task(asyncio.sleep(self._seconds))
        self.replaced_s = await until_replaced(playing, {replica["pid"] for replica in house["replicas"]})
        await enough


async def until_replaced(playing: Playing, old_pids: set[int]) -> float | None:
    """How many seconds it takes until a replica is there that is none of the old ones; None after REPLACED_S."""
    start_s = time.monotonic()
    while (waited_s := time.monotonic() - start_s) < REPLACED_S:
        house = await asyncio.to_thread(bench_server.status, playing.server)
        if house is not None and {replica["pid"] for replica in house["replicas"]} - old_pids - {None}:
            return round(waited_s, 1)
        await asyncio.sleep(POLL_S)
    return None


def figures(log: Log) -> list[dict[str, Any]]:
    """One entry per session. Times in ms, but `last_frame_s`, which like `next_frame_ms` counts from the kill."""
    (kill,) = log.kills
    resumed = {each["session"]: each["total_ms"] for each in bench_report.recoveries(log.kills, log.sessions)}
    return [
        {
            "session": index,
            "is_bystander": index not in kill.sessions,
            **before_and_after(session, kill.at_ms, log.ended_ms),
            "num_closed": sum(event.name == "lost" for event in session.events) + (session.error is not None),
            "next_frame_ms": resumed.get(index),
        }
        for index, session in enumerate(log.sessions)
    ]


def before_and_after(session: SessionLog, kill_ms: float, ended_ms: float) -> dict[str, float | None]:
    """Rates and longest gaps of a session on both sides of the kill."""
    times_ms = [output.received_ms for output in session.outputs if output.received_ms <= ended_ms]
    before = [at_ms for at_ms in times_ms if kill_ms - COMPARED_S * 1000 <= at_ms < kill_ms]
    after = [at_ms for at_ms in times_ms if at_ms >= kill_ms]
    return {
        "fps_before": round(len(before) / COMPARED_S, 2),
        "fps_after": round(len(after) / ((ended_ms - kill_ms) / 1000), 2),
        "longest_gap_before_ms": longest_gap_ms(before),
        "longest_gap_after_ms": longest_gap_ms([*before[-1:], *after, ended_ms]),
        "last_frame_s": round((after[-1] - kill_ms) / 1000, 1) if after else None,
    }


def longest_gap_ms(times_ms: Sequence[float]) -> float | None:
    """Between two of these; None where there are fewer."""
    gaps_ms = [later_ms - earlier_ms for earlier_ms, later_ms in itertools.pairwise(times_ms)]
    return round(max(gaps_ms), 1) if gaps_ms else None


def is_undisturbed(run: dict[str, Any]) -> bool:
    """Whether every bystander kept its socket and streamed to the end."""
    bystanders = [session for session in run["sessions"] if session["is_bystander"]]
    return all(
        session["num_closed"] == 0 and (session["last_frame_s"] or 0.0) > run["seconds"] - SILENT_S
        for session in bystanders
    )


def as_text(run: dict[str, Any]) -> str:
    """The run for people."""
    rows = [
        (
            f"{session['session']}, {'bystander' if session['is_bystander'] else 'replica killed'}",
            number(session["fps_before"], 1),
            number(session["fps_after"], 1),
            f"{number(session['longest_gap_before_ms'])} ms",
            f"{number(session['longest_gap_after_ms'])} ms",
            f"{number(session['last_frame_s'], 1)} s",
            f"{session['num_closed']} times",
            "-" if session["is_bystander"] else f"{number(session['next_frame_ms'])} ms",
        )
        for session in run["sessions"]
    ]
    summary = (
        f"{run['proxy']}: {run['seconds']:.0f} s from the kill; another replica was there after "
        f"{number(run['replaced_s'], 1)} s; "
        f"bystanders {'were not disturbed' if is_undisturbed(run) else 'WERE CUT OFF'}"
    )
    return "\n\n".join([machine_line(run["machine"]), columns([COLUMNS, *rows]), summary])


async def measure(args: argparse.Namespace, server: bench_server.Server) -> dict[str, Any]:
    """The whole run on a server. Raises UserError."""
    async with Client(server.url, portrait=next(iter(bundled_portraits()))) as client:
        size_px = client.ready.size_px
    film = await asyncio.to_thread(load_film, BUNDLED_CLIP, size_px)
    bystanding = Bystanding(args.seconds)
    log = await play(server, Plan(NUM_SESSIONS, args.seconds, args.fps, kill="replica", num_kills=1), film, bystanding)
    return {
        "machine": machine(),
        "proxy": "HAProxy" if args.haproxy else "Python proxy",
        "seconds": args.seconds,
        "input_fps": args.fps,
        "replaced_s": bystanding.replaced_s,
        "sessions": figures(log),
    }


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m serving.bench.bystander",
        description="Kills one of two ingress replicas and watches whether the other's sessions go on.",
    )
    parser.add_argument("--seconds", type=float, default=150.0, help="after the kill (default 150)")
    parser.add_argument("--fps", type=float, default=3.0, help="driving frames a second of each session (default 3)")
    bench_server.add_weights_option(parser)
    parser.add_argument("--haproxy", action="store_true", help="Serve's HAProxy instead of its Python proxy")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args(argv)
    if not SILENT_S < args.seconds < math.inf or not 0 < args.fps <= 1000:
        parser.error(f"--seconds must be more than {SILENT_S:.0f}, and --fps more than 0 and 1000 at most")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status: 1 where a bystander was disturbed."""
    args = parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # Its server must not outlive it.
    print("starting a server, which takes a minute ...", file=sys.stderr)
    try:
        with bench_server.own_server(SETTINGS | {"weights": args.weights}, args.haproxy) as server:
            run = asyncio.run(measure(args, server))
    except UserError as error:
        print(f"error: {error.code}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print(json.dumps(run) if args.json else as_text(run))
    return 0 if is_undisturbed(run) else 1


if __name__ == "__main__":
    sys.exit(main())
