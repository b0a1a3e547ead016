"""A whole server for a test module: `serve run` in a process of its own, on a free port, with a Ray of its own."""

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
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import yaml

ROOT = Path(__file__).parents[2]
READY_S = 240
STOP_S = 30


@dataclass(frozen=True)
class Server:
    port: int
    pid: int
    log: Path

    @property
    def page(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    @property
    def stream(self) -> str:
        return f"ws://127.0.0.1:{self.port}/v1/stream"


@contextlib.contextmanager
def running_server(ready=True, **settings):
    """Starts `serving:app` with these settings; yields when its weights are loaded, or else have failed to load."""
    # Short, since Ray puts unix sockets below it, whose paths may have 107 bytes.
    folder = Path(tempfile.mkdtemp(prefix="pl-", dir="/tmp"))
    port = free_port()
    application = {"name": "default", "route_prefix": "/", "import_path": "serving:app", "args": settings}
    config = {"http_options": {"host": "127.0.0.1", "port": port}, "applications": [application]}
    (folder / "serve.yaml").write_text(yaml.safe_dump(config))
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "PERSONALIVE_"))}
    environment |= {"RAY_TMPDIR": str(folder), "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    environment |= {"PYTHONPATH": str(ROOT)}
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(
            [str(Path(sys.executable).parent / "serve"), "run", str(folder / "serve.yaml")],
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        server = Server(port, process.pid, folder / "log")
        wait_until(server, process, ready)
        yield server
    finally:
        stop(process)
        shutil.rmtree(folder, ignore_errors=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def readiness(server):
    """What `/readyz` says: the status, and the reason where it is not ready."""
    try:
        return urllib.request.urlopen(server.page + "readyz", timeout=5).status, None
    except urllib.error.HTTPError as error:
        # Before there is a replica, Serve's proxy answers 404.
        return error.code, json.loads(error.read())["reason"] if error.code == 503 else None
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return 0, None


def wait_until(server, process, ready):
    deadline_s = time.monotonic() + READY_S
    while time.monotonic() < deadline_s and process.poll() is None:
        status, reason = readiness(server)
        if status == 200 if ready else reason not in (None, "the weights are being loaded"):
            return
        time.sleep(0.5)
    raise AssertionError(f"the server did not get ready; its log ends:\n{server.log.read_text()[-3000:]}")


def stop(process):
    """Ends the server and every process that it has started."""
    with contextlib.suppress(psutil.NoSuchProcess):
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        _, alive = psutil.wait_procs([psutil.Process(process.pid), *children], timeout=STOP_S)
        for survivor in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                survivor.kill()
    process.wait(timeout=10)


@pytest.fixture(scope="module")
def server():
    with running_server(idle_timeout_s=5, pause_timeout_s=10, max_sessions=8, target_fps=1) as running:
        yield running


@pytest.fixture
def media_dir():
    """A folder with a real `driving.mp4` and `portrait.png`, named by the environment."""
    folder = Path(os.environ.get("MEDIA_DIR", ""))
    if not (folder / "driving.mp4").is_file():
        pytest.skip("MEDIA_DIR names no folder with driving.mp4 and portrait.png")
    return folder
