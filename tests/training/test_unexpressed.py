"""Where places on a face come from when its expression changes, held against drawn faces."""

from __future__ import annotations

import dataclasses

import cv2
import numpy as np
import pytest

from training.identity import sample_identity
from training.motion import Motion
from training.places import INSIDE, sources
from training.unexpressed import unexpressed
from training.world import feature_boxes, render

SIDE = 128
REST = Motion()


def person(seed: int):
    return dataclasses.replace(sample_identity(seed), glasses=0.0, hair_style="bald")


def looked_up(picture: np.ndarray, shifts: np.ndarray) -> np.ndarray:
    line = np.arange(SIDE, dtype=np.float32)
    from_x, from_y = (
        (cells + shifts[..., axis] * SIDE / 2).astype(np.float32) for axis, cells in enumerate(np.meshgrid(line, line))
    )
    return cv2.remap(picture, from_x, from_y, cv2.INTER_LINEAR)


def places(*points: tuple[float, float, float]) -> np.ndarray:
    return np.array(points, np.float32)


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("left_eye", {"gaze_x": 0.6, "gaze_y": 0.4}),
        ("right_eye", {"blink_right": 0.6}),
        ("mouth", {"smile": -0.8}),
    ],
    ids=["gaze", "lid", "frown"],
)
def test_a_face_looked_up_there_has_nearly_the_other_expression(part: str, change: dict[str, float]):
    errors, errors_unmoved = [], []
    for seed in range(5):
        motion = dataclasses.replace(REST, **change)
        before, after = (render(person(seed), one, SIDE).astype(np.float32) for one in (REST, motion))
        shifts, kinds, _ = sources(person(seed), REST, motion, SIDE)
        x1, y1, x2, y2 = feature_boxes(person(seed), motion, SIDE)[part]
        inside = np.zeros((SIDE, SIDE), bool)
        inside[y1:y2, x1:x2] = True
        inside &= kinds != INSIDE
        errors.append(np.abs(looked_up(before, shifts) - after)[inside].mean())
        errors_unmoved.append(np.abs(before - after)[inside].mean())
    assert np.mean(errors) < 0.6 * np.mean(errors_unmoved)


def test_an_expression_stays_where_it_is():
    points = np.random.default_rng(0).uniform(-0.9, 0.9, (500, 3)).astype(np.float32)
    motion = Motion(jaw=0.5, smile=0.4, gaze_x=0.3, blink_left=0.2, brow=0.6)
    same, inside = unexpressed(person(1), motion, motion, points)
    np.testing.assert_allclose(same, points, atol=1e-5)
    assert not inside.any()


def test_a_shut_mouth_and_shut_eyes_hide_what_is_inside():
    face = person(2)
    mouth, eye = (0.0, face.mouth_y + 0.1, -0.6), (-face.eye_spacing, face.eye_y, -0.6)
    shut = Motion(blink_left=1.0)
    _, inside = unexpressed(face, shut, Motion(jaw=1.0), places(mouth, eye, (0.0, 0.1, -0.6)))
    assert inside.tolist() == [True, True, False]
    _, inside = unexpressed(face, Motion(jaw=1.0), shut, places(mouth, eye))
    assert not inside.any()


def test_the_chin_comes_from_higher_up_when_the_jaw_falls():
    chin, forehead = (0.0, 0.95, -0.4), (0.0, -0.6, -0.4)
    moved, _ = unexpressed(person(3), REST, Motion(jaw=1.0), places(chin, forehead))
    np.testing.assert_allclose(moved[:, 1] - (0.95, -0.6), (-0.15, 0.0), atol=1e-5)


def test_raised_brows_come_from_below():
    face = person(4)
    moved, _ = unexpressed(face, REST, Motion(brow=1.0), places((0.3, face.brow_y - 0.08, -0.6)))
    assert moved[0, 1] > face.brow_y - 0.05


def test_the_back_of_the_head_has_no_expression():
    back = places((0.1, 0.6, 0.5), (-0.3, -0.05, 0.5))
    moved, inside = unexpressed(person(5), REST, Motion(jaw=1.0, gaze_x=1.0), back)
    np.testing.assert_array_equal(moved, back)
    assert not inside.any()
