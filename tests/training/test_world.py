"""The world draws the same person whatever the motion, and knows exactly where everything is."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from stages.config import KeypointConfig
from stages.keypoints import boxes, posed_keypoints
from training.identity import sample_identity
from training.motion import Motion, sample_motion
from training.world import backdrop, canonical_keypoints, feature_boxes, project, render, true_pose

SIZE = 128
TURNED = Motion(pitch=8.0, yaw=-18.0, roll=10.0, x=0.1, y=-0.05, scale=0.6)


def test_the_same_seed_gives_the_same_pixels():
    first, second = (render(sample_identity(5), TURNED, SIZE) for _ in range(2))
    assert np.array_equal(first, second)


def test_different_seeds_give_different_people():
    pictures = [render(sample_identity(seed), TURNED, SIZE).astype(int) for seed in (5, 6)]
    assert np.abs(pictures[0] - pictures[1]).mean() > 10


def test_motion_leaves_the_backdrop_alone():
    identity = dataclasses.replace(sample_identity(8), hair_style="short", neckline="round")
    still = render(identity, Motion(), SIZE)
    moved = render(identity, dataclasses.replace(TURNED, x=0.0, y=0.0), SIZE)
    assert np.array_equal(still[:20, :20], moved[:20, :20])
    assert np.array_equal(still[0, 0], np.uint8(backdrop(identity, SIZE)[0, 0] * 255 + 0.5))


def test_keypoints_follow_the_stages_own_formula():
    pose = true_pose(sample_identity(3), TURNED)
    assert np.allclose(project(pose)[..., :2], posed_keypoints(pose).numpy()[..., :2], atol=1e-5)


@pytest.mark.parametrize("seed", [1, 14, 40])
def test_closing_an_eye_changes_the_picture_at_that_eyes_keypoint(seed: int):
    identity = dataclasses.replace(sample_identity(seed), glasses=0.0)
    closed = dataclasses.replace(TURNED, blink_left=1.0)
    changed = np.abs(render(identity, TURNED, SIZE).astype(int) - render(identity, closed, SIZE)).sum(-1)
    rows, columns = np.nonzero(changed > 12)
    eye = (project(true_pose(identity, TURNED))[0, 5, :2] * 0.5 + 0.5) * SIZE
    assert np.hypot(columns.mean() - eye[0], rows.mean() - eye[1]) < 0.04 * SIZE


def test_opening_the_jaw_changes_the_picture_around_the_mouth():
    identity = sample_identity(11)
    opened = dataclasses.replace(TURNED, jaw=0.9)
    changed = np.abs(render(identity, TURNED, SIZE).astype(int) - render(identity, opened, SIZE)).sum(-1)
    rows, _ = np.nonzero(changed > 40)
    points = (project(true_pose(identity, TURNED))[0] * 0.5 + 0.5) * SIZE
    assert points[12, 1] < rows.mean() < points[15, 1] + 0.1 * SIZE


@pytest.mark.parametrize("seed", range(6))
def test_the_face_box_holds_brows_eyes_mouth_and_chin(seed: int):
    identity, motion = sample_identity(seed), sample_motion(np.random.default_rng(seed))
    points = torch.from_numpy(project(true_pose(identity, motion)))
    x1, y1, x2, y2 = boxes(points, SIZE, KeypointConfig())[0].tolist()
    inner = ((points[0, [3, 4, 5, 6, 12, 15, 18, 19], :2] * 0.5 + 0.5) * SIZE).numpy()
    assert (inner >= (x1 - 1, y1 - 1)).all() and (inner <= (x2 + 1, y2 + 1)).all()
    assert 0.4 * SIZE < y2 - y1 < SIZE


def test_canonical_keypoints_are_mirror_symmetric():
    points = canonical_keypoints(sample_identity(2))
    for left, right in ((1, 2), (3, 4), (5, 6), (7, 8)):
        assert np.allclose(points[left] * (-1, 1, 1), points[right])


@pytest.mark.parametrize("seed", range(4))
def test_feature_boxes_hold_their_keypoints_inside_the_picture(seed: int):
    identity, motion = sample_identity(seed), sample_motion(np.random.default_rng(seed))
    places = (project(true_pose(identity, motion))[0, :, :2] + 1) / 2 * SIZE
    for name, index in {"left_eye": 5, "right_eye": 6, "mouth": 11, "face": 12}.items():
        x1, y1, x2, y2 = feature_boxes(identity, motion, SIZE)[name]
        assert x1 - 1 <= places[index, 0] <= x2 + 1 and y1 - 1 <= places[index, 1] <= y2 + 1
        assert 0 <= x1 < x2 <= SIZE and 0 <= y1 < y2 <= SIZE
