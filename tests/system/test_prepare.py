"""`training.prepare` as a Ray Data job over two nodes: good, broken and empty videos, and a second run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import ray
from ray.cluster_utils import Cluster

from stages.messages import Pixels
from training.cutting import Limits
from training.footage import Settings
from training.identity import sample_identity
from training.layout import read_boxes, read_manifest
from training.motion import sample_clip
from training.prepare import prepare
from training.world import render, write_clip

pytestmark = pytest.mark.system

SETTINGS = Settings(size_px=64, limits=Limits(min_frames=8, max_frames=32, min_crop_px=40))


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Two nodes of one CPU each."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    yield cluster.address
    ray.shutdown()
    cluster.shutdown()


def talk(path: Path, seed: int, num_frames: int) -> None:
    motions = sample_clip(np.random.default_rng(seed), num_frames)
    write_clip(path, [render(sample_identity(seed), motion, 128) for motion in motions], preset="ultrafast")


def test_a_folder_of_videos_becomes_data_and_a_second_run_does_only_what_is_new(address: str, tmp_path: Path) -> None:
    videos, out = tmp_path / "in", tmp_path / "out"
    videos.mkdir()
    talk(videos / "one.mp4", 1, 12)
    talk(videos / "two.mp4", 2, 15)
    empty: Pixels = np.full((98, 122, 3), 120, np.uint8)
    write_clip(videos / "empty.mp4", [empty] * 9)
    (videos / "broken.mp4").write_bytes((videos / "one.mp4").read_bytes()[:999])

    made = prepare(videos, out, SETTINGS, address, num_workers=2)
    assert {name: count["stretches"] for name, count in made["counts"].items()} == {
        "used": 2,
        "bad_video": 1,
        "no_face": 1,
    }
    manifest = read_manifest(out)
    assert sorted(clip.num_frames for clip in manifest.clips) == [12, 15]
    assert [len(read_boxes(out, clip.name).mouth) for clip in manifest.clips] == [c.num_frames for c in manifest.clips]

    before = {path: path.stat().st_mtime_ns for path in (out / "videos").iterdir()}
    talk(videos / "three.mp4", 3, 10)
    assert prepare(videos, out, SETTINGS, address, num_workers=2)["counts"]["used"] == {"stretches": 3, "frames": 37}
    assert len(read_manifest(out).clips) == 3
    assert before.items() <= {path: path.stat().st_mtime_ns for path in (out / "videos").iterdir()}.items()
