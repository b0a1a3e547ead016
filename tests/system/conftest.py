"""A whole server for a test module: `serve run` in a process of its own, on a free port, with a Ray of its own."""

import contextlib
import json
import os
import shutil
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import pytest

from serving.bench import server as bench_server

READY_S = 240


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
    port = bench_server.free_port()
    process = bench_server.start(folder, port, settings)
    try:
        server = Server(port, process.pid, folder / "log")
        wait_until(server, process, ready)
        yield server
    finally:
        bench_server.stop(process)
        shutil.rmtree(folder, ignore_errors=True)


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


@pytest.fixture(scope="module")
def server():
    with running_server(idle_timeout_s=5, pause_timeout_s=20, max_sessions=8, target_fps=1) as running:
        yield running


@pytest.fixture
def media_dir():
    """A folder with a real `driving.mp4` and `portrait.png`, named by the environment."""
    folder = Path(os.environ.get("MEDIA_DIR", ""))
    if not (folder / "driving.mp4").is_file():
        pytest.skip("MEDIA_DIR names no folder with driving.mp4 and portrait.png")
    return folder
