"""Ray Data's batches against those of the plain loop, bit for bit: ranks, bad clips, resumption, ends of datasets."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import ray

from training import loading
from training.clips import Sampling, plain_batches
from training.draw import Plan, draw_clip
from training.layout import BadData, Manifest, boxes_path, video_path
from training.loading import Bench, measure_ranks, ray_batches

pytestmark = pytest.mark.system

SIZE = 48
SPREAD = Sampling(3, "spread")
RUN = Sampling(5, "run", stride=2)
NUM_CPUS = 2


@pytest.fixture(scope="module", autouse=True)
def cluster():
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # Ray's socket paths must stay short
    ray.init(address="local", num_cpus=NUM_CPUS, _temp_dir=folder, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Seven people of unequal lengths; one video is cut, one clip has lost its boxes."""
    folder = tmp_path_factory.mktemp("data")
    lengths = (14, 9, 21, 11, 13, 8, 12)
    clips = tuple(draw_clip(Plan(folder, "talk", seed, length, SIZE)) for seed, length in enumerate(lengths))
    broken = video_path(folder, clips[3].name)
    broken.write_bytes(broken.read_bytes()[:2000])
    boxes_path(folder, clips[5].name).unlink()
    return Manifest(folder, SIZE, 25.0, clips)


def assert_same(batches, others):
    for batch, other in zip(batches, others, strict=True):
        assert batch.bad == other.bad
        for field in dataclasses.fields(batch):
            if field.name != "bad":
                one, two = getattr(batch, field.name), getattr(other, field.name)
                assert one.dtype == two.dtype and np.array_equal(one, two)


@pytest.mark.parametrize(("sampling", "rank", "start_batch"), [(SPREAD, 0, 0), (SPREAD, 1, 9), (RUN, 1, 3)])
def test_ray_and_the_plain_loop_give_the_same_batches(data, sampling, rank, start_batch):
    options = (data, sampling, 2, 5, rank, 2, start_batch)
    batches = list(islice(ray_batches(*options), 12))
    assert_same(batches, islice(plain_batches(*options), 12))
    bad = {pair for batch in batches for pair in batch.bad}
    assert bad and bad <= {(data.clips[3].name, "unreadable_video"), (data.clips[5].name, "bad_boxes")}


def test_one_dataset_follows_the_other_without_a_seam(data, monkeypatch):
    monkeypatch.setattr(loading, "MAX_BLOCK_PICKS", 3)
    monkeypatch.setattr(loading, "BLOCKS_PER_DATASET", 4)
    options = (data, SPREAD, 5, 1, 0, 1)
    assert_same(islice(ray_batches(*options), 7), islice(plain_batches(*options), 7))


def test_too_many_bad_clips_end_the_loop(data):
    nowhere = dataclasses.replace(data, folder=Path("/nowhere"))
    with pytest.raises(BadData, match="4 of the 7 clips are bad"):
        next(ray_batches(nowhere, SPREAD, 9, 1, 0, 1))


def test_a_loop_that_is_left_frees_its_cpus(data):
    loop = ray_batches(data, SPREAD, 2, 5, 0, 1)
    next(loop)
    loop.close()
    deadline_s = time.monotonic() + 20
    while ray.available_resources().get("CPU") != NUM_CPUS:
        assert time.monotonic() < deadline_s, "tasks go on"
        time.sleep(0.2)


def test_two_ranks_load_side_by_side_in_workers_of_their_own(data):
    cost = measure_ranks(Bench(data, RUN, 2, num_warm_frames=24, num_frames=240), 2, num_cpus_per_task=0.5)
    assert cost.frames_per_s > 0 and cost.cpu_ms_per_frame > 0
