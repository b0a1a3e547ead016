"""Augmented crops keep their size and their face; a run shares its stretch; strength 0 changes nothing."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from training.augment import augment_frames, augment_run, jitter, stretch, warp


def crops(num_crops=3, height=40, width=52, colour=(180, 120, 90)):
    """Discs of one colour on black."""
    picture = np.zeros((height, width, 3), np.uint8)
    cv2.circle(picture, (width // 2, height // 2), height // 4, colour, -1)
    return np.repeat(picture[None], num_crops, 0)


def sides(picture):
    """Width and height of what is bright."""
    rows, columns = np.nonzero(picture.max(-1) > picture.max() // 2)
    return columns.max() - columns.min() + 1, rows.max() - rows.min() + 1


@pytest.mark.parametrize("augment", [augment_frames, augment_run])
def test_crops_keep_shape_and_type_and_change(augment):
    augmented = augment(crops(), np.random.default_rng(1))
    assert (augmented.shape, augmented.dtype) == (crops().shape, np.uint8)
    assert not np.array_equal(augmented[0], augmented[1])


@pytest.mark.parametrize("augment", [augment_frames, augment_run])
def test_the_same_generator_augments_the_same_way(augment):
    first, second = (augment(crops(), np.random.default_rng(7)) for _ in range(2))
    assert np.array_equal(first, second)


@pytest.mark.parametrize("augment", [augment_frames, augment_run])
def test_strength_zero_changes_nothing(augment):
    assert np.array_equal(augment(crops(), np.random.default_rng(1), 0.0), crops())


def test_a_small_strength_changes_little():
    def change(strength):
        augmented = augment_frames(crops(8), np.random.default_rng(2), strength)
        return np.abs(augmented.astype(int) - crops(8)).mean()

    assert change(0.05) < 0.2 * change(1.0)


def test_the_input_is_left_alone():
    given = crops()
    augment_run(given, np.random.default_rng(1))
    assert np.array_equal(given, crops())


@pytest.mark.parametrize("is_wide", [True, False])
def test_a_stretch_lengthens_one_side_about_the_centre(is_wide):
    wide, tall = sides(stretch(crops()[0], 1.3, is_wide))
    plain_wide, plain_tall = sides(crops()[0])
    expected = (1.3 * plain_wide, plain_tall) if is_wide else (plain_wide, 1.3 * plain_tall)
    assert (wide, tall) == pytest.approx(expected, abs=1.5)


def proportions(pictures):
    """Width over height of what each shows, as a logarithm."""
    return np.log([wide / tall for wide, tall in map(sides, pictures)])


def test_frames_of_a_run_share_their_stretch():
    white = crops(24, 120, 120, (255, 255, 255))
    for seed in range(4):
        assert proportions(augment_run(white, np.random.default_rng(seed), max_stretch=2.5)).std() < 0.12


def test_independent_frames_are_stretched_each_on_its_own():
    white = crops(24, 120, 120, (255, 255, 255))
    stretched = proportions(augment_frames(white, np.random.default_rng(3)))
    assert stretched.std() > 0.14 and stretched.min() < -0.15 and stretched.max() > 0.15


def test_jitter_without_change_keeps_colours_but_for_rounding():
    assert np.abs(jitter(crops()[0], 1, 1, 1, 0).astype(int) - crops()[0]).max() <= 4


@pytest.mark.parametrize(
    ("change", "colour"),
    [({"brightness": 0.5}, (90, 60, 45)), ({"saturation": 0}, (134, 134, 134)), ({"hue": 1 / 3}, (90, 180, 120))],
)
def test_jitter_changes_brightness_saturation_and_hue(change, colour):
    values = {"brightness": 1, "contrast": 1, "saturation": 1, "hue": 0} | change
    assert jitter(crops()[0], **values)[20, 26].astype(int) == pytest.approx(colour, abs=4)


def test_less_contrast_moves_everything_towards_the_mean():
    flat = jitter(crops()[0], 1, 0.5, 1, 0)
    assert flat[0, 0].min() > 5 and flat[20, 26].max() < 180


def test_a_warp_without_shifts_changes_nothing():
    assert np.array_equal(warp(crops()[0], np.zeros((4, 4, 2), np.float32)), crops()[0])


def test_a_common_shift_moves_the_picture():
    shifted = warp(crops()[0], np.broadcast_to(np.float32([4 / 52, 0]), (4, 4, 2)))
    assert np.array_equal(shifted[:, :-4], crops()[0][:, 4:])


def test_a_warp_is_affine_between_the_points_of_its_grid():
    ramp = np.broadcast_to(np.arange(61, dtype=np.uint8)[None, :, None], (61, 61, 3)).copy()
    shifts = np.zeros((4, 4, 2), np.float32)
    shifts[1, 1, 0] = 12 / 61
    row = warp(ramp, shifts)[20, :, 0].astype(int) - np.arange(61)
    assert row[20] == 12 and row[10] == 6 and row[30] == 6 and not row[40:].any()
