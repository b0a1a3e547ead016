"""Motion curves are natural in timing and retargeting follows the method."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from training.motion import Motion, blend, expression, from_array, retarget, sample_clip, to_array


def test_a_motion_survives_the_way_through_an_array():
    motion = Motion(pitch=3.0, yaw=-4.0, jaw=0.5, smile=-0.25)
    assert to_array(from_array(to_array(motion))).tolist() == pytest.approx(dataclasses.astuple(motion))


def test_retargeting_takes_angles_and_expression_from_the_driver_and_half_its_translation():
    portrait, first = Motion(x=0.1, y=0.2, scale=0.5, yaw=9.0), Motion(x=-0.1, y=0.0, scale=0.7)
    driving = Motion(x=0.1, y=0.1, scale=0.75, yaw=-20.0, jaw=0.5)
    result = retarget(driving, first, portrait)
    assert (result.yaw, result.jaw, result.scale) == (-20.0, 0.5, 0.5)
    assert (result.x, result.y) == pytest.approx((0.2, 0.25))


def test_blending_starts_and_ends_at_its_ends():
    a, b = Motion(yaw=10.0, jaw=0.25), Motion(yaw=-10.0, jaw=0.75)
    yaws = [blend(a, b, weight).yaw for weight in (0.0, 0.5, 1.0)]
    assert yaws == [10.0, 0.0, -10.0]


def test_a_minute_of_talking_has_blinks_speech_and_turns_without_jumps():
    clip = np.stack([to_array(motion) for motion in sample_clip(np.random.default_rng(3), 60 * 25)])
    expressions = np.stack([expression(from_array(row)) for row in clip])
    closings = (np.diff((expressions[:, 2] > 0.5).astype(int)) == 1).sum()
    assert 10 <= closings <= 60
    assert expressions[:, 5].max() > 0.5 and expressions[:, 5].min() < 0.05
    assert np.ptp(clip[:, 1]) > 20
    assert np.abs(np.diff(clip[:, 1])).max() < 12


def test_clips_of_equal_seeds_are_equal():
    first, second = (sample_clip(np.random.default_rng(1), 30) for _ in range(2))
    assert first == second
