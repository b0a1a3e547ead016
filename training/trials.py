"""Held-out trials of the world: people and motions that no training sees, with the exact answer of a reenactment.

Called by `training.evaluate`. The answer is the portrait's person drawn with the driving motion as the method retargets
it (`training.motion.retarget`), which no real data set has. One trial serves cross-reenactment (another person drives)
and self-reenactment (the portrait's own person drives): both have the same answer, so their difference is the driver.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from stages.config import ModelConfig
from stages.keypoints import boxes
from stages.messages import Floats, Pixels
from training.assets import HELD_OUT
from training.identity import Identity, sample_identity
from training.motion import Motion, clamped, retarget, sample_clip, sample_portrait_motion, to_array
from training.world import project, render, true_pose

MAX_PITCH, MAX_YAW, MAX_ROLL = 20.0, 35.0, 20.0
"""Degrees: the range in which models are measured, whatever range they were trained in."""
ENERGY = 1.6
"""Natural curves at this energy use the whole range."""
FPS = 25
WARM_UP_FRAMES = 25
"""Cut from a curve's beginning, where it still eases in."""
DECOY = 1_000_003
"""A trial number beyond those measured: its driver lends motion tokens to the first trial."""
NUM_IDENTITIES = 10_000_000
WARP_START, WARP_END = 0.8, 1.2
"""Head units from the middle of the head between which the warp fades out; chosen for its best PSNR."""


@dataclass(frozen=True)
class Cast:
    """Who and what a trial shows; frames are drawn from it."""

    person: Identity
    driver: Identity
    rest: Motion
    """The portrait's motion."""
    driving: tuple[Motion, ...]
    shown: tuple[Motion, ...]
    """The driving motion as the portrait shall show it."""


@dataclass(frozen=True)
class Trial:
    """One held-out portrait and k driving frames, s x s, with the true answer; pictures uint8, motions (k, 14)."""

    portrait: Pixels
    """(s, s, 3)."""
    rest: Floats
    """(14,) motion of the portrait."""
    driving: Pixels
    """(k, s, s, 3) of another person."""
    self_driving: Pixels
    """(k, s, s, 3) of the portrait's own person, at the driver's place and scale."""
    truth: Pixels
    """(k, s, s, 3)."""
    driving_motions: Floats
    shown_motions: Floats
    face_boxes: NDArray[np.int64]
    """(k, 4) in the truth, as the method cuts faces (section 6.6)."""
    portrait_points: Floats
    """(K, 2) true keypoints of the portrait, [-1, 1] across."""
    shown_points: Floats
    """(k, K, 2) those of the truth."""
    driving_points: Floats
    """(k, K, 2) those of the driving frames."""


def make_cast(seed: int, index: int, num_frames: int) -> Cast:
    """People and motion of trial `index`, a pure function of (seed, index, num_frames)."""
    rng = np.random.default_rng([HELD_OUT, seed, index])
    person, driver = (sample_identity(HELD_OUT + int(number)) for number in rng.integers(NUM_IDENTITIES, size=2))
    rest = within(sample_portrait_motion(rng))
    clip = sample_clip(rng, num_frames + WARM_UP_FRAMES, FPS, ENERGY)[WARM_UP_FRAMES:]
    return cast_of(person, driver, rest, [within(motion) for motion in clip])


def cast_of(person: Identity, driver: Identity, rest: Motion, driving: list[Motion]) -> Cast:
    """A cast with the driving motion retargeted to the person's portrait."""
    shown = tuple(retarget(motion, driving[0], rest) for motion in driving)
    return Cast(person, driver, rest, tuple(driving), shown)


def looped_cast(seed: int, num_frames: int, num_repeated: int) -> Cast:
    """A long trial that ends with the `num_repeated` frames of motion that it starts with.

    Its beginning and its end ask for the same pictures, so a difference in quality is drift and not another motion.
    """
    cast = make_cast(seed, DECOY + 1, num_frames)
    middle = cast.driving[num_repeated : num_frames - num_repeated]
    opening = cast.driving[:num_repeated]
    return cast_of(cast.person, cast.driver, cast.rest, [*opening, *middle, *opening])


def within(motion: Motion) -> Motion:
    """The motion with its angles inside the measured range."""
    return clamped(motion, MAX_PITCH, MAX_YAW, MAX_ROLL)


def draw_trial(cast: Cast, config: ModelConfig) -> Trial:
    """Draws everything of a cast at the model's picture size."""
    size = config.size_px
    shown_points = project_all(cast.person, cast.shown)
    return Trial(
        portrait=render(cast.person, cast.rest, size),
        rest=to_array(cast.rest),
        driving=draw_all(cast.driver, cast.driving, size),
        self_driving=draw_all(cast.person, cast.driving, size),
        truth=draw_all(cast.person, cast.shown, size),
        driving_motions=as_arrays(cast.driving),
        shown_motions=as_arrays(cast.shown),
        face_boxes=boxes_of(shown_points, config),
        portrait_points=project_all(cast.person, (cast.rest,))[0, :, :2],
        shown_points=shown_points[..., :2],
        driving_points=project_all(cast.driver, cast.driving)[..., :2],
    )


def draw_all(person: Identity, motions: tuple[Motion, ...], size: int) -> Pixels:
    """(n, size, size, 3)."""
    return np.stack([render(person, motion, size) for motion in motions])


def as_arrays(motions: tuple[Motion, ...]) -> Floats:
    """(n, 14)."""
    return np.stack([to_array(motion) for motion in motions])


def project_all(person: Identity, motions: tuple[Motion, ...]) -> Floats:
    """True keypoints (n, K, 3) in the picture."""
    return np.concatenate([project(true_pose(person, motion)) for motion in motions])


def boxes_of(points: Floats, config: ModelConfig) -> NDArray[np.int64]:
    """The method's face boxes (n, 4) of true keypoints (n, K, 3)."""
    return np.asarray(boxes(torch.from_numpy(points), config.size_px, config.keypoints).numpy(), np.int64)


def trials(seed: int, num_trials: int, num_frames: int, config: ModelConfig) -> Iterator[Trial]:
    """The trials of a seed, drawn one by one; the first few of many are the same as of few."""
    for index in range(num_trials):
        yield draw_trial(make_cast(seed, index, num_frames), config)


def decoy_driving(seed: int, num_frames: int, config: ModelConfig) -> Pixels:
    """(num_frames, s, s, 3) of a driver outside of all trials."""
    cast = make_cast(seed, DECOY, num_frames)
    return draw_all(cast.driver, cast.driving, config.size_px)


def impostors(seed: int, num_people: int, config: ModelConfig) -> tuple[Pixels, Floats]:
    """Portraits (n, s, s, 3) of people who are in no trial, and their motions (n, 14)."""
    rng = np.random.default_rng([HELD_OUT, seed, DECOY])
    people = [
        sample_identity(HELD_OUT + NUM_IDENTITIES + int(number)) for number in rng.integers(10**6, size=num_people)
    ]
    motions = [within(sample_portrait_motion(rng)) for _ in people]
    pictures = [render(person, motion, config.size_px) for person, motion in zip(people, motions, strict=True)]
    return np.stack(pictures), as_arrays(tuple(motions))


def warped(trial: Trial) -> Pixels:
    """The portrait's head moved in 2D by the true pose, (k, s, s, 3): what a picture can do that knows only the pose.

    The best affine map of the true keypoints acts on the head and fades out around it. (Applied to the whole picture
    it moves the background too, and is then often worse than the unmoved portrait.)
    """
    size = len(trial.portrait)
    start, ends = (
        np.float32(size / 2) * (points + 1) - np.float32(0.5) for points in (trial.portrait_points, trial.shown_points)
    )
    moved = [
        _moved(trial.portrait, affine(end, start), motion)
        for end, motion in zip(ends, trial.shown_motions, strict=True)
    ]
    return np.stack(moved)


def affine(start: Floats, end: Floats) -> Floats:
    """(2, 3) map of points (K, 2) to points (K, 2) with the least squared error."""
    padded = np.concatenate([start, np.ones_like(start[:, :1])], 1).astype(np.float64)
    return np.asarray(np.linalg.lstsq(padded, end.astype(np.float64), rcond=None)[0].T, np.float32)


def _moved(picture: Pixels, back: Floats, motion: Floats) -> Pixels:
    """The picture where the map `back` leads inside the head that motion (14,) places, unmoved far from it."""
    size = len(picture)
    grid = np.stack(np.meshgrid(np.arange(size), np.arange(size)), -1).astype(np.float32)
    centre = (motion[3:5] + 1) * size / 2 - 0.5
    reach = np.linalg.norm(grid - centre, axis=-1) / (motion[5] * size / 2)
    near = np.clip((WARP_END - reach) / (WARP_END - WARP_START), 0, 1)[..., None]
    near = near * near * (3 - 2 * near)
    source = near * (grid @ back[:, :2].T + back[:, 2]) + (1 - near) * grid
    columns, rows = np.moveaxis(source.astype(np.float32), -1, 0)
    return np.asarray(cv2.remap(picture, columns, rows, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE), np.uint8)
