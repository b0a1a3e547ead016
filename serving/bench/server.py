"""A server of the load generator's own: `serve run` in a process of its own, with a Ray of its own; and what it says.

Called by `serving.bench`. Another Ray on this machine is neither used nor touched. No Ray, no torch in this process.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import psutil
import yaml

from serving.bench.log import Memory
from serving.bench.machine import processes_of, tree_rss_mb
from stages.errors import UserError

ROOT = Path(__file__).parents[2]
READY_S = 300.0
STOP_S = 30.0
KILL_S = 10.0
ANSWER_S = 5.0
HAPROXY = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": "86400",
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "2",
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "5",
}
"""Serve's HAProxy as in cluster/haproxy.env, but for the last: nobody is there to be drained when it ends."""


class ServerNotReady(UserError):
    """The server that was started did not come up."""

    code = "not_ready"


@dataclass(frozen=True)
class Server:
    """A running server."""

    url: str
    """Of its stream."""
    root_pid: int | None = None
    """The `serve run` above all its processes; None for a server that somebody else has started."""

    def page(self, path: str) -> str:
        """The address of one of its pages."""
        parts = urlsplit(self.url)
        return urlunsplit((parts.scheme.replace("ws", "http", 1), parts.netloc, path, "", ""))


@contextlib.contextmanager
def own_server(settings: dict[str, Any], haproxy: bool = False) -> Iterator[Server]:
    """Starts `serving:app` with these settings on a free port, and ends it with all its processes. Takes a minute.

    Raises ServerNotReady with the end of its log.
    """
    # Short, since Ray puts unix sockets below it, whose paths may have 107 bytes.
    folder = Path(tempfile.mkdtemp(prefix="pl-", dir="/tmp"))
    port = free_port()
    process = start(folder, port, settings, haproxy)
    try:
        server = Server(f"ws://127.0.0.1:{port}/v1/stream", process.pid)
        wait_until_ready(server, process, folder / "log")
        yield server
    finally:
        stop(process)
        shutil.rmtree(folder, ignore_errors=True)


def start(folder: Path, port: int, settings: dict[str, Any], haproxy: bool = False) -> subprocess.Popen[bytes]:
    """`serve run` with these settings, in a session of its own: Ctrl-C is for who starts it, and who then ends it.

    What it prints goes to `log` in the folder, and below this lies all that its Ray writes.
    """
    (folder / "serve.yaml").write_text(yaml.safe_dump(serve_config(port, settings)))
    with open(folder / "log", "w") as log:
        return subprocess.Popen(
            [serve_command(), "run", str(folder / "serve.yaml")],
            cwd=ROOT,
            env=server_environment(folder, haproxy),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=heed_interrupts,
        )


def add_weights_option(parser: argparse.ArgumentParser) -> None:
    """`--weights`, for commands that start a server of their own."""

    def from_anywhere(text: str) -> str:
        # The server runs in another directory.
        return text if text == "tiny" else str(Path(text).expanduser().resolve())

    text = "of the server it starts (default: the bundled)"
    parser.add_argument("--weights", type=from_anywhere, default="tiny", metavar="FOLDER", help=text)


def heed_interrupts() -> None:
    """A command in a shell's background ignores SIGINT, and so would what it starts; but that is how a server ends."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def serve_config(port: int, settings: dict[str, Any]) -> dict[str, Any]:
    """What `serve run` reads."""
    application = {"name": "default", "route_prefix": "/", "import_path": "serving:app", "args": settings}
    return {"http_options": {"host": "127.0.0.1", "port": port}, "applications": [application]}


def serve_command() -> str:
    """The `serve` of this Python."""
    return str(Path(sys.executable).parent / "serve")


def server_environment(folder: Path, haproxy: bool) -> dict[str, str]:
    """This process's environment, without what somebody set for another Ray or another server."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "PERSONALIVE_"))}
    environment |= {"RAY_TMPDIR": str(folder), "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    return environment | {"PYTHONPATH": str(ROOT)} | (HAPROXY if haproxy else {})


def free_port() -> int:
    """A port on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until_ready(server: Server, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until `/readyz` says so. Raises ServerNotReady."""
    deadline_s = time.monotonic() + READY_S
    while time.monotonic() < deadline_s and process.poll() is None:
        if get_json(server.page("/readyz")) is not None:
            return
        time.sleep(0.5)
    why = f"did not get ready in {READY_S:.0f} s" if process.poll() is None else "ended while it started"
    raise ServerNotReady(f"the server {why}; its log ends:\n{log.read_text(errors='replace')[-3000:]}")


def stop(process: subprocess.Popen[bytes], stop_s: float = STOP_S) -> None:
    """Ends a server and every process that it has started: asks, and after `stop_s` makes them."""
    processes = processes_of(process.pid)
    try:
        process.send_signal(signal.SIGINT)
        psutil.wait_procs(processes, timeout=stop_s)
    finally:
        # Also when somebody presses Ctrl-C once more. Those that were started since are below one of the others.
        survivors = {*processes, *(child for one in processes for child in processes_of(one.pid))}
        for survivor in survivors:
            with contextlib.suppress(psutil.NoSuchProcess):
                survivor.kill()
        process.wait(timeout=KILL_S)
        psutil.wait_procs(list(survivors), timeout=KILL_S)


def get_json(url: str) -> Any:
    """What a page answers; None when it does not, or not with 200."""
    try:
        with urllib.request.urlopen(url, timeout=ANSWER_S) as answer:
            return json.load(answer)
    except (OSError, HTTPException, ValueError):
        return None


def status(server: Server) -> dict[str, Any] | None:
    """The whole house as `/v1/status` shows it; None while no replica answers."""
    answer = get_json(server.page("/v1/status"))
    return answer if isinstance(answer, dict) else None


def memory(server: Server, t_s: float) -> Memory | None:
    """The server's memory now: of its processes, or as it tells itself where they are somebody else's."""
    if server.root_pid is not None:
        return Memory(round(t_s, 1), *tree_rss_mb(server.root_pid))
    house = status(server)
    return None if house is None else Memory(round(t_s, 1), told_rss_mb(house), None)


def told_rss_mb(house: dict[str, Any]) -> float:
    """Members, manager and replicas by a status; what is not known counts for nothing."""
    parts = [*house.get("members", ()), *house.get("replicas", ()), house.get("manager") or {}]
    return round(sum(part.get("rss_mb") or 0.0 for part in parts), 1)
