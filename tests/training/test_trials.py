"""Held-out trials: repeatable, unseen, in range, and with the answer that the method's retargeting asks for."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from stages.config import ModelConfig
from training.assets import HELD_OUT
from training.measures import psnr
from training.motion import clamped, from_array, retarget, to_array
from training.trials import (
    MAX_PITCH,
    MAX_ROLL,
    MAX_YAW,
    Trial,
    affine,
    decoy_driving,
    draw_trial,
    impostors,
    looped_cast,
    make_cast,
    trials,
    warped,
)
from training.world import render


@pytest.fixture(scope="module")
def trial(config: ModelConfig) -> Trial:
    return draw_trial(make_cast(5, 1, 6), config)


def test_a_trial_is_a_pure_function_of_seed_and_number(config: ModelConfig, trial: Trial):
    again = list(trials(5, 2, 6, config))[1]
    assert all(np.array_equal(getattr(trial, f.name), getattr(again, f.name)) for f in dataclasses.fields(Trial))


def test_other_seeds_and_numbers_give_other_people_and_motions():
    casts = [make_cast(*key, 6) for key in ((0, 0), (0, 1), (1, 0), (1, 1))]
    assert len({cast.person for cast in casts} | {cast.driver for cast in casts}) == 8
    assert len({cast.driving for cast in casts}) == 4


def test_everybody_is_held_out():
    casts = [make_cast(seed, 0, 4) for seed in range(20)]
    assert min(person.seed for cast in casts for person in (cast.person, cast.driver)) >= HELD_OUT


def test_motions_stay_in_the_measured_range_and_reach_its_ends():
    motions = np.stack([to_array(m) for index in range(12) for m in make_cast(3, index, 100).driving])
    largest = np.abs(motions[:, :3]).max(0)
    assert (largest <= np.float32((MAX_PITCH, MAX_YAW, MAX_ROLL))).all()
    assert (largest > (15, 30, 12)).all()


def test_the_truth_is_the_portraits_person_in_the_retargeted_motion(config: ModelConfig, trial: Trial):
    cast = make_cast(5, 1, 6)
    shown = retarget(cast.driving[4], cast.driving[0], cast.rest)
    assert np.array_equal(trial.truth[4], render(cast.person, shown, config.size_px))
    assert np.allclose(trial.shown_motions[4], to_array(shown))
    assert np.array_equal(trial.self_driving[4], render(cast.person, cast.driving[4], config.size_px))
    assert clamped(from_array(trial.rest), MAX_PITCH, MAX_YAW, MAX_ROLL) == from_array(trial.rest)


def test_face_boxes_enclose_part_of_the_picture(config: ModelConfig, trial: Trial):
    x1, y1, x2, y2 = trial.face_boxes.T
    assert ((x1 >= 0) & (x1 < x2) & (x2 <= config.size_px) & (y1 < y2)).all()


def test_an_affine_map_is_found_again():
    place = np.array([[0.9, 0.2, 3.0], [-0.1, 1.1, -2.0]], np.float32)
    points = np.random.default_rng(0).normal(size=(7, 2)).astype(np.float32)
    assert np.allclose(affine(points, points @ place[:, :2].T + place[:, 2]), place, atol=1e-5)


def test_the_warp_is_nearer_to_the_truth_than_the_unmoved_portrait(config: ModelConfig):
    found = []
    for trial in trials(2, 3, 8, config):
        static = np.repeat(trial.portrait[None], 8, 0)
        found.append(psnr(warped(trial), trial.truth) - psnr(static, trial.truth))
    assert np.mean(found) > 0.3


def test_a_long_trial_ends_with_the_motion_it_starts_with():
    cast = looped_cast(0, 23, 7)
    assert len(cast.driving) == 23
    assert cast.driving[-7:] == cast.driving[:7]
    assert cast.shown[-7:] == cast.shown[:7]
    assert cast.driving[7:14] != cast.driving[:7]


def test_decoys_and_impostors_are_in_no_trial(config: ModelConfig):
    driving = decoy_driving(0, 4, config)
    pictures, motions = impostors(0, 3, config)
    assert driving.shape == (4, config.size_px, config.size_px, 3)
    assert pictures.shape == (3, config.size_px, config.size_px, 3)
    assert motions.shape == (3, 14)
    assert not np.array_equal(driving, next(trials(0, 1, 4, config)).driving)
