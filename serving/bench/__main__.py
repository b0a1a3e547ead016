"""The load generator: `python -m serving.bench` plays real sessions through a server and measures what they get.

It starts a server of its own with two ingress replicas, and ends it, unless `--url` names one. Runs with other numbers
of sessions, with too much input, with processes being killed, and beside bad clients; docs/service.md holds recorded
results. No Ray, no torch in this process.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from serving.bench import kills as bench_kills
from serving.bench import plots as bench_plots
from serving.bench import server as bench_server
from serving.bench import table as bench_table
from serving.bench.machine import machine
from serving.bench.runs import GOOD_SESSIONS, measure, measure_beside_bad_clients
from serving.bench.server import Server, own_server
from stages.errors import UserError
from stages.portraits import BUNDLED_CLIP
from stages.video import header_num_frames

NUM_REPLICAS = 2
"""Of an own server: one can die while the other serves."""
ALL_ADMITTED_FPS = 1.0
"""A target rate that leaves room for everybody."""
MARGIN = 0.9
"""Of a target rate, so that the places which it is to give are there for sure."""


def setting(args: argparse.Namespace) -> dict[str, Any]:
    """Where all runs take place: the figures without any run."""
    server = {"url": args.url} if args.url else server_settings(args, None) | {"haproxy": args.haproxy}
    return {"machine": machine(), "server": server, "runs": []}


def server_settings(args: argparse.Namespace, target_fps: float | None) -> dict[str, Any]:
    """Of an own server; None: its own target rate."""
    settings = {"weights": args.weights, "num_replicas": NUM_REPLICAS, "spare_members": args.spare_members}
    target_fps = args.target_fps or target_fps
    return settings if target_fps is None else settings | {"target_fps": target_fps}


@contextlib.contextmanager
def the_server(args: argparse.Namespace, target_fps: float | None) -> Iterator[Server]:
    """The one that is named, or an own one. Raises UserError."""
    if args.url:
        yield Server(args.url)
        return
    print("starting a server, which takes a minute ...", file=sys.stderr)
    with own_server(server_settings(args, target_fps), args.haproxy) as server:
        yield server


@contextlib.contextmanager
def server_with_places(args: argparse.Namespace, num_sessions: int) -> Iterator[Server]:
    """A server on which so many sessions find a place, and few more. Raises UserError."""
    with the_server(args, None) as server:
        house = bench_server.status(server) or {}
        num_places, target_fps = house.get("places", num_sessions), house.get("target_fps", ALL_ADMITTED_FPS)
        if num_places >= num_sessions or args.url or args.target_fps:
            yield server
            return
    with the_server(args, MARGIN * target_fps * num_places / num_sessions) as server:
        yield server


def run_all(args: argparse.Namespace, figures: dict[str, Any]) -> None:
    """Adds every run that the command line asks for. Raises UserError."""
    if args.newcomer or args.overload or args.kill or not args.bad_clients:
        with the_server(args, None if args.newcomer else ALL_ADMITTED_FPS) as server:
            asyncio.run(measure(args, server, figures))
    for num in (args.sessions or GOOD_SESSIONS) if args.bad_clients else ():
        with server_with_places(args, num) as server:
            asyncio.run(measure_beside_bad_clients(args, server, figures, num))


def numbers(text: str) -> list[float]:
    """Comma-separated positive numbers."""
    values = [float(part) for part in text.split(",")]
    if not all(0 < value < math.inf for value in values):
        raise ValueError(text)
    return values


def counts(text: str) -> list[int]:
    """Comma-separated positive integers, each once."""
    values = list(dict.fromkeys(int(part) for part in text.split(",")))
    if min(values) < 1:
        raise ValueError(text)
    return values


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m serving.bench",
        description="Plays real sessions through a server and measures what they get: rates, delays, recoveries.",
        epilog="Every --sessions number gets an undisturbed run, and one of each kind that is asked for beside it. "
        "Without --sessions these are 1,2,4,8; 1 for --overload, 3 for --kill, 2 for --bad-clients. "
        "The runs beside bad clients have a server of their own, on which the good ones hold the places.",
    )
    parser.add_argument("--sessions", type=counts, metavar="N,N", help="at once, such as 1,2,4,8")
    parser.add_argument("--seconds", type=float, default=30.0, help="of each run (default 30); with --kill at least")
    parser.add_argument(
        "--overload", type=numbers, metavar="X,X", help="also send X times what one session alone was seen to use"
    )
    parser.add_argument("--kill", choices=bench_kills.KILLABLE, help="also kill this while sessions stream")
    parser.add_argument("--kills", type=int, default=5, metavar="N", help="so many times (default 5)")
    parser.add_argument("--bad-clients", action="store_true", help="also stream beside ten bad clients")
    parser.add_argument(
        "--newcomer", action="store_true", help="instead, take all places at the target rate, and then come once more"
    )
    parser.add_argument("--url", help="of a running server's stream, such as ws://127.0.0.1:8000/v1/stream")
    parser.add_argument("--haproxy", action="store_true", help="Serve's HAProxy instead of its Python proxy")
    bench_server.add_weights_option(parser)
    parser.add_argument("--spare-members", type=int, default=0, metavar="N", help="warm stand-ins (default 0)")
    parser.add_argument(
        "--target-fps",
        type=float,
        metavar="X",
        help="of the server (default 1, so that everybody is admitted; for --newcomer and --bad-clients its own)",
    )
    parser.add_argument("--driving", type=Path, default=BUNDLED_CLIP, metavar="VIDEO", help="default: the bundled clip")
    parser.add_argument("--fps", type=float, help="driving frames a second of each session (default: the video's)")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="draw plots into this folder; needs matplotlib")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the JSON here too, after every run")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    args = parser.parse_args(argv)
    if not 0 < args.seconds < math.inf or args.kills < 1 or args.spare_members < 0:
        parser.error("--seconds must be more than 0 and an end, --kills 1 or more, --spare-members 0 or more")
    if not all(0 < fps <= 1000 for fps in (args.fps, args.target_fps) if fps is not None):
        parser.error("--fps and --target-fps must be more than 0, and 1000 at most")
    if args.url and (args.kill or args.haproxy or args.spare_members):
        parser.error("--kill, --haproxy and --spare-members need a server of the benchmark's own: leave --url out")
    if args.newcomer and (args.sessions or args.overload or args.kill or args.bad_clients):
        parser.error("--newcomer is a run of its own, with as many sessions as there are places: leave the others out")
    if args.out and not args.out.absolute().parent.is_dir():
        parser.error(f"--out {args.out}: make the folder {args.out.parent} first")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status: 1 where a run was not what it should have been."""
    args = parse_args(argv)
    figures = setting(args)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # Its server must not outlive it.
    try:
        # What is missing is said before a minute is spent.
        header_num_frames(args.driving)
        if args.plots:
            bench_plots.load_matplotlib()
        run_all(args, figures)
        if args.plots:
            bench_plots.write_plots(figures, args.plots)
    except UserError as error:
        print(f"error: {error.code}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print(json.dumps(figures) if args.json else bench_table.as_text(figures))
    return 1 if any(run["errors"] for run in figures["runs"]) else 0


if __name__ == "__main__":
    sys.exit(main())
