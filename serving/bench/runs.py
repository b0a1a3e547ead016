"""The runs that the load generator's command line asks for, one after another. Called by `serving.bench`."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import sys
from dataclasses import dataclass, replace
from typing import Any

from tqdm import tqdm

from serving.bench import kills as bench_kills
from serving.bench import newcomer as bench_newcomer
from serving.bench import report as bench_report
from serving.bench import server as bench_server
from serving.bench.log import Kill, Log, Plan
from serving.bench.play import During, Film, Playing, load_film, play
from serving.bench.server import Server
from serving.client import Client
from serving.line import now_ms
from stages.errors import UserError
from stages.portraits import bundled_portraits

PLAIN_SESSIONS = (1, 2, 4, 8)
OVERLOAD_SESSIONS = (1,)
KILL_SESSIONS = (3,)
GOOD_SESSIONS = (2,)
"""Numbers of sessions where the command line gives none."""
REFERENCE_S = 60.0
"""How long the one session is measured at most that `--overload` multiplies, when nobody asked for that run."""
WARM_UP_S = 5.0
LEAVE_S = 120.0
"""Bad clients take their time to go, which is no part of the run."""
PAUSE_S = 1.0
"""Between two runs, so that places and memory of the last one are given back."""

Run = dict[str, Any]


@dataclass
class Bench:
    """A server, what is played through it, and the runs so far."""

    args: argparse.Namespace
    server: Server
    film: Film
    figures: dict[str, Any]
    """Of the machine and the server, and all `runs`."""
    target_fps: float | None
    """The server's."""

    async def run(self, plan: Plan, during: During, alone: Run | None = None) -> Run:
        """Plays one run. `alone`: a run of the same sessions without what disturbs this one."""
        await asyncio.sleep(PAUSE_S)
        return self.keep(await play(self.server, plan, self.film, during), alone)

    def keep(self, log: Log, alone: Run | None = None) -> Run:
        """The figures of a run that is over, which go to `--out` too: they survive what happens later."""
        run = bench_report.figures(log, alone) | {"target_fps": self.target_fps}
        self.figures["runs"].append(run)
        if self.args.out:
            self.args.out.write_text(json.dumps(self.figures, indent=1) + "\n")
        return run

    @property
    def input_fps(self) -> float:
        """Of a camera, where nothing else is asked for."""
        return float(self.args.fps or self.film.fps)


async def measure(args: argparse.Namespace, server: Server, figures: dict[str, Any]) -> None:
    """Adds all `runs` that the command line asks for to the figures, but for those beside bad clients.

    Raises UserError.
    """
    bench = await _prepare(args, server, figures)
    if args.newcomer:
        await run_newcomer(bench)
        return
    plain = await run_plain(bench)
    if args.overload:
        await run_overload(bench, plain[1])
    if args.kill:
        for num in args.sessions or KILL_SESSIONS:
            plan = Plan(num, args.seconds, bench.input_fps, kill=args.kill, num_kills=args.kills)
            await bench.run(plan, kills(plan))


async def measure_beside_bad_clients(
    args: argparse.Namespace, server: Server, figures: dict[str, Any], num_sessions: int
) -> None:
    """Adds the runs of good sessions alone, and with ten bad clients beside them. Raises UserError."""
    bench = await _prepare(args, server, figures)
    plan = Plan(num_sessions, args.seconds, bench.input_fps)
    alone = await bench.run(plan, wait_for(plan.seconds, f"{plan.name}, to compare"))
    plan = replace(plan, has_bad_clients=True)
    await bench.run(plan, bad_clients(plan), alone)


async def _prepare(args: argparse.Namespace, server: Server, figures: dict[str, Any]) -> Bench:
    async with Client(server.url, portrait=next(iter(bundled_portraits()))) as client:
        size_px = client.ready.size_px
    house = await asyncio.to_thread(bench_server.status, server) or {}
    film = await asyncio.to_thread(load_film, args.driving, size_px)
    bench = Bench(args, server, film, figures, house.get("target_fps"))
    # A server's first frames are slow, whoever asks for them.
    warm_up_s = min(WARM_UP_S, args.seconds)
    await play(server, Plan(1, warm_up_s, bench.input_fps), film, wait_for(warm_up_s, "warm-up"))
    return bench


async def run_plain(bench: Bench) -> dict[int, Run]:
    """Undisturbed runs, by their number of sessions."""
    args = bench.args
    others = args.overload or args.kill
    plans = {
        num: Plan(num, args.seconds, bench.input_fps) for num in args.sessions or (() if others else PLAIN_SESSIONS)
    }
    if args.overload and 1 not in plans:
        plans[1] = Plan(1, min(args.seconds, REFERENCE_S), bench.input_fps)
    return {num: await bench.run(plan, wait_for(plan.seconds, plan.name)) for num, plan in plans.items()}


async def run_overload(bench: Bench, reference: Run) -> None:
    """Runs with so many times the input that one session was seen to use."""
    if not reference["total_fps"]:
        raise UserError("one session alone got no frames, so there is no rate to multiply", "no_frames")
    for num in bench.args.sessions or OVERLOAD_SESSIONS:
        for factor in bench.args.overload:
            fps = factor * reference["total_fps"] / num
            plan = Plan(num, bench.args.seconds, fps, overload=factor)
            await bench.run(plan, wait_for(plan.seconds, plan.name))


async def run_newcomer(bench: Bench) -> None:
    """As many sessions as there are places, and then one more. Raises UserError."""
    house = await asyncio.to_thread(bench_server.status, bench.server)
    if house is None:
        raise UserError("the server does not tell how many places it has", "no_status")
    plan = Plan(house["places"], 2 * bench.args.seconds, bench.input_fps, has_newcomer=True)
    halves = [wait_for(bench.args.seconds, f"{plan.name}: {part}") for part in ("all are there", "it waits")]
    bench.keep(await bench_newcomer.play_with_one_more(bench.server, plan, bench.film, *halves))


def wait_for(seconds: float, words: str) -> During:
    """Nothing happens for so long."""

    async def during(playing: Playing) -> None:
        with progress(words, seconds, "s") as bar:
            for begin_s in range(math.ceil(seconds)):
                length_s = min(1.0, seconds - begin_s)
                await asyncio.sleep(length_s)
                bar.update(length_s)

    return during


def kills(plan: Plan) -> During:
    """All kills, and at least the plan's time."""

    async def during(playing: Playing) -> None:
        with progress(plan.name, plan.num_kills, "kill") as bar:

            def show(kill: Kill) -> None:
                bar.set_postfix_str(kill.what, refresh=False)
                bar.update()

            least = asyncio.create_task(asyncio.sleep(plan.seconds))
            await bench_kills.kill_in_turn(playing, show)
            await least

    return during


def bad_clients(plan: Plan) -> During:
    """Ten bad clients, in a process of their own: what they cost there is not the server's fault."""

    async def during(playing: Playing) -> None:
        command = (sys.executable, "-m", "serving.fuzz.bad_clients", "--url", playing.server.url, "--json")
        process = await asyncio.create_subprocess_exec(
            *command, "--seconds", str(plan.seconds), stdout=asyncio.subprocess.PIPE
        )
        try:
            await wait_for(plan.seconds, plan.name)(playing)
            playing.log.ended_ms = now_ms()
            async with asyncio.timeout(LEAVE_S):
                answer, _ = await process.communicate()
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        if process.returncode:
            raise UserError("the bad clients failed: see above", "bad_clients")
        playing.log.bad_clients = json.loads(answer)

    return during


def progress(words: str, total: float, unit: str) -> Any:
    """A bar on stderr, where that is a terminal."""
    form = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} " + unit + " [{elapsed}<{remaining}{postfix}]"
    return tqdm(total=total, desc=words, file=sys.stderr, disable=None, bar_format=form)
