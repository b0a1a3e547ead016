"""A whole server for a test module: `serve run` in a process of its own, on a free port, with a Ray of its own. And
light weights, for tests of whatever a model does not matter to.
"""

import contextlib
import dataclasses
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
MAX_FRAMES_BEHIND = 40
"""A stream's delay times its rate: it is behind by the window, the chunks in flight and the chunk that is being filled,
in all some 24 frames, and not by what a slow machine has not got round to."""


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


@pytest.fixture(scope="session")
def light_weights(find_faces, tmp_path_factory):
    """A model without a mover, 64x64, in its weights as training starts: it finds a face in the middle of everything,
    turns the portrait a little, as an ellipsoid would turn, and takes a small part of the bundled one's time."""
    from stages.weights import NETWORKS, save_folder
    from training.handover import load_networks
    from training.phases.build import fit_base
    from training.recipes import smoke_model

    model = smoke_model()
    guider = dataclasses.replace(
        model.pose_guider, mover_channels=(), expression_channels=(), depth_channels=(), light_channels=()
    )
    keypoints = dataclasses.replace(
        model.keypoints, depths=(1, 1, 1, 1), fine_channels=0, upright_channels=(), upright_depths=()
    )
    model = dataclasses.replace(
        model,
        name="light",
        unet=dataclasses.replace(model.unet, max_positions=16),
        keypoints=keypoints,
        pose_guider=guider,
        window=dataclasses.replace(model.window, chunk_frames=4, timesteps=(0, 333, 666, 999)),
    )
    networks = load_networks(NETWORKS, model, None, seed=0, may_be_fresh=True)
    fit_base(networks["pose_guider"], networks["vae"], model)
    find_faces(networks["keypoint_extractor"], 0.1)
    folder = tmp_path_factory.mktemp("light")
    save_folder(folder, model, {name: network.state_dict() for name, network in networks.items()})
    return str(folder)


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
