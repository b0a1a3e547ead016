"""Ingress replicas that die or are replaced while people stream, with a light model. Longer: `python -m
serving.bench.bystander`.
"""

import asyncio
import itertools
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from serving.bench import server as bench_server
from serving.bench.log import Plan
from serving.bench.play import load_film, play
from serving.bench.server import Server
from stages.portraits import BUNDLED_CLIP

from .conftest import running_server

pytestmark = pytest.mark.system

SIZE_PX = 256
FPS = 3
MOVED_S = 60
LONGEST_GAP_S = 10


@pytest.mark.parametrize("proxy", [[], ["--haproxy"]], ids=["Python proxy", "HAProxy"])
def test_a_replica_that_dies_disturbs_nobody_on_another(proxy, light_weights):
    options = ["--weights", light_weights, "--seconds", "30", "--json", *proxy]
    command = [sys.executable, "-m", "serving.bench.bystander", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    run = json.loads(done.stdout)
    assert run["replaced_s"] is not None
    for session in run["sessions"]:
        assert session["num_closed"] == (0 if session["is_bystander"] else 1)
        assert session["longest_gap_after_ms"] < LONGEST_GAP_S * 1000


def test_a_redeploy_moves_everybody_before_their_replica_goes(light_weights):
    with running_server(num_replicas=2, target_fps=1, weights=light_weights) as server:
        log = asyncio.run(
            play(Server(server.stream), Plan(3, 30, FPS), load_film(BUNDLED_CLIP, SIZE_PX), redeploy(server))
        )
    for session in log.sessions:
        names = [event.name for event in session.events]
        # Who moves early may come to another old replica, and so moves twice.
        assert names in (["draining", "reconnected"], ["draining", "reconnected"] * 2)
        assert all(event.detail["resumed"] for event in session.events if event.name == "reconnected")
        assert session.error is None
        assert session.num_checked and not session.num_wrong
        gaps_ms = [later.received_ms - output.received_ms for output, later in itertools.pairwise(session.outputs)]
        assert max(gaps_ms) < LONGEST_GAP_S * 1000


def redeploy(server):
    """Changes a setting that leaves the pool alone, and waits until the old replicas have gone."""

    async def during(playing):
        await asyncio.sleep(8)
        old = await replica_pids(playing)
        await asyncio.to_thread(deploy, server, max_fps=29)
        deadline_s = time.monotonic() + MOVED_S
        while len(now := await replica_pids(playing)) < 2 or now & old:
            assert time.monotonic() < deadline_s, f"replicas {now & old} are still there"
            await asyncio.sleep(1)
        await asyncio.sleep(5)

    return during


async def replica_pids(playing):
    house = await asyncio.to_thread(bench_server.status, playing.server)
    return {replica["pid"] for replica in house["replicas"]} if house else set()


def deploy(server, **settings):
    """`serve deploy` with other settings."""
    path = server.log.parent / "serve.yaml"
    config = yaml.safe_load(path.read_text())
    config["applications"][0]["args"] |= settings
    path.write_text(yaml.safe_dump(config))
    dashboard = re.search(r"View the dashboard at \S*?(http://[\d.:]+)", server.log.read_text())
    command = [str(Path(sys.executable).parent / "serve"), "deploy", "--address", dashboard[1], str(path)]
    done = subprocess.run(command, env=os.environ | {"RAY_AUTH_MODE": "disabled"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
