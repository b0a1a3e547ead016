"""The bundled pictures are those that `training.assets` draws, and nobody in them is trained on."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from training.assets import DRIVER, HELD_OUT, PORTRAITS, driving_motions, write_portraits

ASSETS = Path(__file__).parents[2] / "stages" / "assets"


def test_everybody_in_the_assets_is_held_out():
    assert min(*PORTRAITS.values(), DRIVER) >= HELD_OUT
    assert len({*PORTRAITS.values(), DRIVER}) == len(PORTRAITS) + 1


def test_the_bundled_portraits_are_the_drawn_ones(tmp_path: Path):
    write_portraits(tmp_path, 64)
    for name in PORTRAITS:
        bundled = cv2.imread(str(ASSETS / "portraits" / f"{name}.png"))
        drawn = cv2.imread(str(tmp_path / f"{name}.png"))
        assert bundled.shape == (512, 512, 3)
        small = cv2.resize(bundled, (64, 64), interpolation=cv2.INTER_AREA)
        assert np.abs(small.astype(int) - drawn).mean() < 8


def test_the_driving_clip_starts_facing_the_camera_and_turns_later():
    motions = driving_motions()
    assert len(motions) == 300
    assert abs(motions[0].yaw) < 1
    assert np.ptp([motion.yaw for motion in motions]) > 30
    assert sum(motion.blink_left > 0.5 for motion in motions) > 5
