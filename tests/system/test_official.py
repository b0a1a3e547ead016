"""Weights in the authors' layout, converted and served: synthetic, small UNets and full-size motion networks."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from stages.portraits import BUNDLED_CLIP

from .conftest import running_server

pytestmark = pytest.mark.system

SET = Path(__file__).parents[1] / "parity" / "subset"
NUM_SECONDS = 0.16
"""One chunk; behind it the window still holds the transition to it."""


def run(*command):
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    official, ours = tmp_path_factory.mktemp("official"), tmp_path_factory.mktemp("converted")
    run(SET / "make_mini_weights.py", SET, official)
    done = run("-m", "stages.convert", official, ours, "--size-px", "64")
    assert "academic research only" in done.stderr
    return ours


def test_converted_official_weights_stream_the_same_pixels_as_offline(converted, tmp_path):
    media = ("--portrait", "ada", "--driving", BUNDLED_CLIP, "--seed", "7", "--json")
    with running_server(weights=str(converted)) as server:
        live = ("--url", server.stream, "--lossless", "--codec", "raw", "--seconds", NUM_SECONDS)
        online = json.loads(run("-m", "serving.client", *media, "--out", tmp_path / "a.mp4", *live).stdout)
        assert "academic research only" in server.log.read_text()
    more = ("--weights", converted, "--frames", online["frames_sent"], "--out", tmp_path / "b.mp4")
    offline = json.loads(run("-m", "stages.animate", *media, *more).stdout)
    assert online["frames_received"] == online["frames_sent"] == offline["frames"]
    assert online["frames_sha256"] == offline["frames_sha256"]
