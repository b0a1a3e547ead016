"""Training on a cluster of two Ray nodes on this machine: as a submitted job, and with a worker that is killed."""

from __future__ import annotations

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
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch

from training.checkpoints import newest_checkpoint
from training.curves import read_metrics
from training.draw import Plan, draw_clip
from training.layout import Manifest, write_manifest

pytestmark = pytest.mark.system

ROOT = Path(__file__).parents[2]
PHASE = "stream"
"""With a discriminator, and with updates that go on where the one before left the clip."""
NUM_STEPS, KILLED_FROM_STEP = 9, 4
WAIT_S = 600
TWO_NODES = """
import json, sys
from pathlib import Path
from ray.cluster_utils import Cluster

temporary, port, agent_port = sys.argv[1], *map(int, sys.argv[2:])
# Ray notes the cluster there, too, and expects the folder, which a machine does not have before its first Ray.
Path("/tmp/ray").mkdir(exist_ok=True)
dashboard = {"include_dashboard": True, "dashboard_port": port, "dashboard_agent_listen_port": agent_port}
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "temp_dir": temporary, **dashboard})
cluster.add_node(num_cpus=2)
# As `ray start` does: jobs look for their cluster there, and otherwise take any that they find on the machine.
Path(temporary, "ray_current_cluster").write_text(cluster.address)
print(json.dumps(cluster.address), flush=True)
sys.stdin.read()
cluster.shutdown()
"""


@dataclass(frozen=True)
class TwoNodes:
    """A running cluster: two nodes of two CPUs each."""

    address: str
    jobs: str
    """Address for `ray job submit`."""
    pid: int
    """Of the process that all others descend from."""


@pytest.fixture(scope="module")
def environment():
    cleared = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    # A worker may take more than Ray's minute to start where other tests keep the processors busy.
    slow = {"RAY_worker_register_timeout_seconds": "300", "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300"}
    return cleared | slow | {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}


@pytest.fixture(scope="module")
def two_nodes(environment):
    # Short, since Ray puts unix sockets below it, whose paths may have 107 bytes.
    folder, port = tempfile.mkdtemp(prefix="pl-", dir="/tmp"), free_port()
    command = [sys.executable, "-c", TWO_NODES, folder, str(port), str(free_port())]
    process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    started = psutil.Process(process.pid)
    try:
        address = next((line for line in process.stdout if line.startswith('"')), None)
        assert address, "the cluster did not start"
        yield TwoNodes(json.loads(address), f"http://127.0.0.1:{port}", process.pid)
    finally:
        descendants = started.children(recursive=True)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=30)
        for left in [*descendants, started]:
            with contextlib.suppress(psutil.NoSuchProcess):
                left.kill()
        shutil.rmtree(folder, ignore_errors=True)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Five people of 64x64, sixteen frames each."""
    folder = tmp_path_factory.mktemp("data")
    clips = tuple(draw_clip(Plan(folder, "talk", seed, 16, 64)) for seed in range(5))
    write_manifest(Manifest(folder, 64, 25.0, clips))
    return folder


def command(data, out):
    """A short phase with a worker on each node."""
    often = ["batch_size=1", "checkpoint_every=3", "log_every=1", "optimiser.ema_decay=0.9"]
    changes = [part for change in often for part in ("--set", f"{PHASE}.{change}")]
    options = ["--workers", "2", "--threads-per-worker", "1", "--steps", str(NUM_STEPS), *changes]
    base = [sys.executable, "-m", "training.run", PHASE, "--recipe", "smoke"]
    return [*base, "--data", str(data), "--out", str(out), *options]


def log_of(path):
    return path.read_text(errors="replace")[-4000:]


@pytest.fixture(scope="module")
def submitted(two_nodes, environment, data, tmp_path_factory):
    """OUT and the log of an undisturbed run, submitted as a job."""
    out = tmp_path_factory.mktemp("submitted")
    ray = str(Path(sys.executable).parent / "ray")
    job = [ray, "job", "submit", "--address", two_nodes.jobs, "--working-dir", ".", "--", *command(data, out)]
    deadline_s = time.monotonic() + WAIT_S
    while (code := logged(job, environment, out / "log")) and "No available agent" in log_of(out / "log"):
        assert time.monotonic() < deadline_s, "the cluster does not take jobs"
        time.sleep(1)
    assert code == 0, log_of(out / "log")
    return out


def logged(job, environment, log):
    """Runs a command to its end, its output in a file; its exit code."""
    with open(log, "w") as file:
        done = subprocess.run(job, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, timeout=WAIT_S)
    return done.returncode


def train_workers(two_nodes):
    """The processes that train, newest last."""
    found = []
    for process in psutil.Process(two_nodes.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if any("RayTrainWorker" in part for part in process.cmdline()):
                found.append((process.create_time(), process.pid))
    return [pid for _, pid in sorted(found)]


def step_reached(out):
    metrics = read_metrics(out / PHASE)
    return int(metrics[-1]["step"]) if metrics else 0


def test_a_submitted_job_trains_to_its_end(submitted):
    text = (submitted / "log").read_text(errors="replace")
    assert "Started training worker group of size 2" in text and "succeeded" in text
    assert [int(metrics["step"]) for metrics in read_metrics(submitted / PHASE)] == list(range(1, NUM_STEPS + 1))
    weights = {path.stem for path in (submitted / PHASE / "weights").glob("*.safetensors")}
    assert {"denoising_unet", "critic"} <= weights


def test_a_run_with_a_killed_worker_goes_on_by_itself_and_ends_bit_equal(
    submitted, two_nodes, environment, data, tmp_path
):
    log = tmp_path / "log"
    with open(log, "w") as file:
        connected = environment | {"RAY_ADDRESS": two_nodes.address}
        driver = subprocess.Popen(command(data, tmp_path), cwd=ROOT, env=connected, stdout=file, stderr=file)
        try:
            deadline_s = time.monotonic() + WAIT_S
            while step_reached(tmp_path) < KILLED_FROM_STEP:
                assert driver.poll() is None and time.monotonic() < deadline_s, log_of(log)
                time.sleep(0.02)
            before = train_workers(two_nodes)
            nodes = {psutil.Process(worker).ppid() for worker in before}
            os.kill(before[-1], signal.SIGKILL)
            killed_at = step_reached(tmp_path)
            assert driver.wait(WAIT_S) == 0, log_of(log)
        finally:
            driver.kill()
    assert len(before) == len(nodes) == 2 and killed_at < NUM_STEPS
    assert log.read_text(errors="replace").count("Started training worker group of size 2") == 2
    one, other = (newest_checkpoint(out / PHASE / "checkpoints") for out in (submitted, tmp_path))
    assert one.state == other.state and one.state.step == NUM_STEPS
    assert one.groups.keys() == other.groups.keys()
    for name, tensors in one.groups.items():
        assert tensors.keys() == other.groups[name].keys()
        assert all(torch.equal(tensor, other.groups[name][key]) for key, tensor in tensors.items()), name
