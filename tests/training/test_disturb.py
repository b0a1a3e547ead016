"""Disturbed pictures stay true to what is said of them."""

from __future__ import annotations

import numpy as np
import pytest

from training.disturb import degrade, displaced_face, empty_picture, reframe
from training.identity import sample_identity
from training.motion import Motion, to_array
from training.world import render


def test_a_reframed_picture_shows_the_pose_that_is_said():
    motion = Motion(yaw=12.0, roll=5.0, x=0.05, scale=0.6)
    picture = render(sample_identity(31), motion, 128)
    moved, pose = reframe(picture, to_array(motion)[:6], 128, np.random.default_rng(2))
    redrawn = render(sample_identity(31), Motion(*(float(value) for value in pose)), 128)
    centre = slice(44, 84)
    difference = np.abs(moved[centre, centre].astype(int) - redrawn[centre, centre]).mean()
    unmoved = np.abs(picture[centre, centre].astype(int) - redrawn[centre, centre]).mean()
    assert difference < 0.5 * unmoved


def test_reframing_of_no_strength_changes_nothing():
    picture, pose = render(sample_identity(31), Motion(), 64), to_array(Motion(yaw=12.0))[:6]
    same, same_pose = reframe(picture, pose, 64, np.random.default_rng(2), 0.0)
    assert np.array_equal(same, picture) and np.allclose(same_pose, pose)


def test_degrading_changes_light_and_sharpness_and_keeps_size_and_type():
    picture = render(sample_identity(31), Motion(), 48)
    changed = [degrade(picture, np.random.default_rng(seed)) for seed in range(8)]
    assert all(one.shape == picture.shape and one.dtype == np.uint8 for one in changed)
    assert sum(not np.array_equal(one, picture) for one in changed) >= 6


@pytest.mark.parametrize("seed", range(5))
def test_empty_pictures_are_pictures(seed: int):
    picture = empty_picture(48, np.random.default_rng(seed))
    assert picture.shape == (48, 48, 3) and picture.dtype == np.uint8


def test_a_displaced_face_is_a_crop_of_the_asked_size_even_at_the_edge():
    picture = render(sample_identity(31), Motion(), 64)
    box = np.array([40, 30, 64, 64])
    crops = [displaced_face(picture, box, 32, np.random.default_rng(seed)) for seed in range(6)]
    assert all(crop.shape == (32, 32, 3) for crop in crops)
    assert not np.array_equal(crops[0], crops[1])
