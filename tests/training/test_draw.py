"""Drawn data folders: complete, repeatable, and what they say is true of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import av
import numpy as np
import pytest

from training.draw import NUM_TRANSITION_FRAMES, Plan, draw_clip, draw_data, pose_motions, talk_motions
from training.identity import sample_identity
from training.layout import BadData, read_boxes, read_manifest, read_truth, video_path
from training.motion import MAX_YAW, from_array
from training.world import render


def decoded(path: Path) -> list[np.ndarray]:
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def test_a_clip_shows_the_motions_that_its_truth_says(tmp_path: Path):
    clip = draw_clip(Plan(tmp_path, "poses", 9, 3, 64))
    truth = read_truth(tmp_path, clip.name)
    frames = decoded(video_path(tmp_path, clip.name))
    assert truth is not None and len(frames) == len(truth.motions) == clip.num_frames == 3
    redrawn = render(sample_identity(9), from_array(truth.motions[2]), 64)
    assert np.abs(frames[2].astype(int) - redrawn).mean() < 6
    assert (read_boxes(tmp_path, clip.name).face[:, 2:] > read_boxes(tmp_path, clip.name).face[:, :2]).all()


def test_a_folder_has_a_manifest_and_a_second_run_draws_nothing_again(tmp_path: Path):
    draw_data(tmp_path, "talk", range(3, 5), 15, 32, 1)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("videos/*")}
    manifest = draw_data(tmp_path, "talk", range(3, 5), 15, 32, 1)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("videos/*")} == times
    assert read_manifest(tmp_path) == manifest and [clip.num_frames for clip in manifest.clips] == [15, 15]


def test_a_folder_is_not_filled_with_clips_of_another_size(tmp_path: Path):
    draw_data(tmp_path, "poses", range(1), 2, 32, 1)
    with pytest.raises(BadData, match="other settings"):
        draw_data(tmp_path, "poses", range(1), 2, 64, 1)
    assert read_manifest(tmp_path).size_px == 32


def test_talk_starts_at_the_portrait_and_keeps_its_scale():
    motions = talk_motions(np.random.default_rng(4), NUM_TRANSITION_FRAMES + 11)
    assert len(motions) == NUM_TRANSITION_FRAMES + 11
    assert dataclasses.astuple(motions[0]) == pytest.approx(dataclasses.astuple(motions[1]), abs=1e-5)
    assert {round(motion.scale, 5) for motion in motions} == {round(motions[0].scale, 5)}


def test_poses_share_the_portraits_scale_and_cover_the_range():
    motions = [m for seed in range(30) for m in pose_motions(np.random.default_rng(seed), 6)[1:]]
    yaws = np.array([motion.yaw for motion in motions])
    assert yaws.min() < -0.75 * MAX_YAW and yaws.max() > 0.75 * MAX_YAW and np.abs(yaws).max() <= MAX_YAW
    assert len({motion.scale for motion in pose_motions(np.random.default_rng(1), 6)}) == 1
