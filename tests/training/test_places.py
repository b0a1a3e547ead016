"""Where things in drawn pictures are from, held against the pictures."""

from __future__ import annotations

import dataclasses

import cv2
import numpy as np
import pytest

from training.identity import sample_identity
from training.motion import Motion, sample_motion, sample_portrait_motion
from training.places import BACKDROP, BODY, HEAD, MIDDLING, TOWARDS, head_shape, light_map, sources
from training.world import project, render, shade, true_pose

SIDE = 48


def turned(seed: int) -> tuple[Motion, Motion]:
    """A portrait's motion and another one that keeps its expression."""
    rng = np.random.default_rng(seed)
    portrait, other = sample_portrait_motion(rng), sample_motion(rng, 0.6)
    pose = {name: getattr(other, name) for name in ("pitch", "yaw", "roll")}
    return portrait, dataclasses.replace(portrait, x=portrait.x + 0.05, **pose)


def looked_up(picture: np.ndarray, shifts: np.ndarray) -> np.ndarray:
    line = np.arange(SIDE, dtype=np.float32)
    from_x, from_y = (
        (cells + shifts[..., axis] * SIDE / 2).astype(np.float32) for axis, cells in enumerate(np.meshgrid(line, line))
    )
    return cv2.remap(picture, from_x, from_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


def test_what_is_looked_up_there_is_nearly_the_picture():
    errors, errors_unmoved = [], []
    for seed in range(6):
        portrait, motion = turned(seed)
        person = sample_identity(600 + seed)
        shifts, kinds, _ = sources(person, portrait, motion, SIDE)
        before, after = (render(person, one, SIDE, 2.0).astype(np.float32) for one in (portrait, motion))
        inside = cv2.erode((kinds == HEAD).astype(np.uint8), np.ones((5, 5))) > 0
        errors.append(np.abs(looked_up(before, shifts) - after)[inside].mean())
        errors_unmoved.append(np.abs(before - after)[inside].mean())
    assert np.mean(errors) < 0.6 * np.mean(errors_unmoved)


def test_nothing_moves_between_a_portrait_and_itself():
    portrait, _ = turned(1)
    shifts, kinds, _ = sources(sample_identity(601), portrait, portrait, SIDE)
    assert np.abs(shifts).max() < 1e-5
    assert {BACKDROP, BODY, HEAD} <= set(kinds.ravel().tolist())


@pytest.mark.parametrize("seed", [0, 3])
def test_the_backdrop_stays_and_the_body_moves_as_one(seed: int):
    portrait, motion = turned(seed)
    shifts, kinds, _ = sources(sample_identity(600 + seed), portrait, motion, SIDE)
    assert not shifts[kinds == BACKDROP].any()
    assert np.abs(shifts[kinds == BODY].std(0)).max() < 1e-6 < np.abs(shifts[kinds == BODY].mean(0)).max()


def test_the_nose_is_nearest_and_where_it_is_the_depth_is_its_keypoints():
    person, portrait = sample_identity(603), Motion(pitch=4, yaw=-8, roll=3, x=0.05, y=-0.04, scale=0.6)
    depth, is_head, normals, _ = head_shape(person, portrait, 96)
    [points] = project(true_pose(person, portrait))
    column, row = ((points[12, :2] + 1) * 48).astype(int)
    assert is_head[row, column] and not is_head[0].any()
    assert depth[row, column] == pytest.approx(points[12, 2], abs=0.05)
    assert depth[is_head].min() > points[12, 2] - 0.05 and depth[is_head].max() > points[12, 2] + 0.4
    np.testing.assert_allclose(np.linalg.norm(normals[is_head], axis=-1), 1, atol=1e-5)
    assert (normals[is_head][:, 2] < 0).all() and not normals[~is_head & (depth == 0)].any()
    left, right = (normals[row, column + aside][0] for aside in (-16, 16))
    assert left < right


def test_behind_every_part_of_the_head_lies_its_back_which_is_the_same_from_behind():
    for seed in (605, 606, 607):
        person, portrait = sample_identity(seed), Motion(scale=0.6)
        depth, is_head, _, thickness = head_shape(person, portrait, 64)
        assert (thickness >= 0).all() and not thickness[~is_head].any()
        middle = thickness[24:32, 28:36]
        assert middle.min() > 0.6 * 1.4 and middle.max() < 0.6 * 2.6
        mirrored = dataclasses.replace(portrait, yaw=180.0)
        front, is_behind, _, _ = head_shape(person, mirrored, 64)
        both = is_head & is_behind[:, ::-1]
        off = (depth + thickness) - (-front[:, ::-1])
        assert np.median(np.abs(off[both])) < 0.01


def test_light_is_told_by_where_surfaces_face():
    person = sample_identity(604)
    told, within = light_map(person, 33)
    assert told.shape == (33, 33, 3) and within[16, 16] and not within[0, 0]
    straight = np.float32([[0, 0, -1]]) * TOWARDS
    bright = shade(person, np.full((1, 3), MIDDLING, np.float32), straight, 0.0)[0]
    np.testing.assert_allclose(np.exp(told[16, 16]) * MIDDLING, bright, rtol=1e-4)
    lit_side = told[16, 16 + 8 * int(np.sign(person.light[0]))]
    assert lit_side.mean() > told[16, 16 - 8 * int(np.sign(person.light[0]))].mean()
