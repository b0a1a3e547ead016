"""How a person moves: pose and expression of a frame, and natural curves of both. Called by `training.world`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

EXPRESSION = ("gaze_x", "gaze_y", "blink_left", "blink_right", "brow", "jaw", "mouth_wide", "smile")
"""The fields of `Motion` that the face crop must tell, in the order of `expression`."""


@dataclass(frozen=True)
class Motion:
    """One frame's motion. Angles in degrees; positions in [-1, 1] across the picture; x right, y down, z away."""

    pitch: float = 0.0
    """Positive looks down."""
    yaw: float = 0.0
    """Positive turns towards the picture's left."""
    roll: float = 0.0
    """Positive tilts the crown to the picture's right."""
    x: float = 0.0
    y: float = 0.0
    scale: float = 0.62
    """Head unit over half the picture."""
    gaze_x: float = 0.0
    """-1 to 1, positive to the picture's right."""
    gaze_y: float = 0.0
    """-1 to 1, positive down."""
    blink_left: float = 0.0
    """0 open, 1 closed; the eye on the picture's left."""
    blink_right: float = 0.0
    brow: float = 0.0
    """-1 frown to 1 raised."""
    jaw: float = 0.0
    """0 closed to 1 wide open."""
    mouth_wide: float = 0.0
    """-1 puckered to 1 stretched."""
    smile: float = 0.0
    """-1 corners down to 1 corners up."""


def to_array(motion: Motion) -> NDArray[np.float32]:
    """All fields in their order, (14,)."""
    return np.array(dataclasses.astuple(motion), np.float32)


def from_array(values: NDArray[np.float32]) -> Motion:
    """Inverse of `to_array`."""
    return Motion(*(float(v) for v in values))


def expression(motion: Motion) -> NDArray[np.float32]:
    """What the motion tokens have to carry, (8,) in the order of `EXPRESSION`."""
    return np.array([getattr(motion, name) for name in EXPRESSION], np.float32)


def blend(a: Motion, b: Motion, weight: float) -> Motion:
    """Linear from a (weight 0) to b (weight 1) in every field."""
    return from_array((1 - weight) * to_array(a) + weight * to_array(b))


def retarget(driving: Motion, first: Motion, portrait: Motion) -> Motion:
    """Driving motion as the portrait shall show it: angles and expression absolute, half the translation since the
    first driving frame, the portrait's scale (method: section 6.3)."""
    return dataclasses.replace(
        driving,
        x=portrait.x + 0.5 * (driving.x - first.x),
        y=portrait.y + 0.5 * (driving.y - first.y),
        scale=portrait.scale,
    )


MAX_PITCH, MAX_YAW, MAX_ROLL = 22.0, 38.0, 22.0
"""Degrees that training covers: a little more than what is measured (`training.evaluate`)."""


def clamped(
    motion: Motion, max_pitch: float = MAX_PITCH, max_yaw: float = MAX_YAW, max_roll: float = MAX_ROLL
) -> Motion:
    """The motion with its angles inside a range."""
    return dataclasses.replace(
        motion,
        pitch=float(np.clip(motion.pitch, -max_pitch, max_pitch)),
        yaw=float(np.clip(motion.yaw, -max_yaw, max_yaw)),
        roll=float(np.clip(motion.roll, -max_roll, max_roll)),
    )


def sample_motion(rng: np.random.Generator, spread: float = 1.0) -> Motion:
    """A single independent motion, covering the whole range more evenly than the curves do."""
    u = rng.uniform
    blink = float(np.clip(u(-0.6, 1.15), 0, 1)) if rng.random() < 0.45 else 0.0
    wink = blink if rng.random() < 0.8 else float(np.clip(u(-0.3, 1), 0, 1))
    return Motion(
        pitch=float(spread * u(-22, 24)), yaw=float(spread * u(-34, 34)), roll=float(spread * u(-20, 20)),
        x=float(u(-0.2, 0.2)), y=float(u(-0.12, 0.16)), scale=float(u(0.52, 0.74)),
        gaze_x=float(u(-1, 1)), gaze_y=float(u(-0.8, 0.8)), blink_left=blink, blink_right=wink, brow=float(u(-1, 1)),
        jaw=float(np.clip(u(-0.5, 1), 0, 1)), mouth_wide=float(u(-1, 1)), smile=float(u(-0.7, 1)),
    )  # fmt: skip


def sample_portrait_motion(rng: np.random.Generator) -> Motion:
    """A motion people have in portraits: nearly frontal, eyes open, mouth mostly closed."""
    n = rng.normal
    return Motion(
        pitch=float(n(0, 4)), yaw=float(n(0, 8)), roll=float(n(0, 3)),
        x=float(np.clip(n(0, 0.06), -0.15, 0.15)), y=float(rng.uniform(-0.06, 0.12)),
        scale=float(rng.uniform(0.54, 0.72)), gaze_x=float(n(0, 0.15)), gaze_y=float(n(0, 0.1)), brow=float(n(0, 0.2)),
        jaw=float(np.clip(n(-0.1, 0.15), 0, 1)), mouth_wide=float(n(0, 0.2)),
        smile=float(np.clip(n(0.35, 0.25), -0.4, 1)),
    )  # fmt: skip


def sample_clip(rng: np.random.Generator, num_frames: int, fps: float = 25.0, energy: float = 1.0) -> list[Motion]:
    """A person talking, looking about and nodding for `num_frames` frames."""
    time_s = np.arange(num_frames) / fps
    blink = _blinks(rng, time_s)
    speech = _speech(rng, time_s)
    gaze_x, gaze_y = _saccades(rng, time_s)
    yaw = 22 * energy * _drift(rng, time_s, 2.2) + 4 * gaze_x
    pitch = 9 * energy * _drift(rng, time_s, 1.8) + 7 * energy * _nods(rng, time_s) + 2.5 * speech * rng.uniform(0, 1)
    roll = 9 * energy * _drift(rng, time_s, 2.5)
    smile = np.clip(0.15 + 0.75 * _drift(rng, time_s, 1.6), -0.6, 1)
    brow = np.clip(0.7 * _drift(rng, time_s, 1.1) + 0.3 * speech - 0.1, -1, 1)
    wide = np.clip(0.75 * _drift(rng, time_s, 0.35), -1, 1)
    x = 0.03 + 0.09 * energy * _drift(rng, time_s, 3.0)
    y = 0.03 + 0.05 * energy * _drift(rng, time_s, 3.0)
    scale = 0.62 + 0.035 * _drift(rng, time_s, 4.0) + rng.uniform(-0.06, 0.06)
    gaze_x, gaze_y = np.clip(gaze_x - yaw * -0.012, -1, 1), np.clip(gaze_y - pitch * 0.01, -1, 1)
    columns = np.broadcast_arrays(
        pitch, yaw, roll, x, y, scale, gaze_x, gaze_y, blink, blink, brow, speech, wide, smile
    )  # fmt: skip
    return [from_array(row) for row in np.stack(columns, 1).astype(np.float32)]


def _drift(rng: np.random.Generator, time_s: NDArray[np.float64], period_s: float) -> NDArray[np.float64]:
    """Smooth wandering in about [-1, 1]: eased moves between held targets."""
    num = int(time_s[-1] / period_s) + 4 if len(time_s) else 4
    knots = np.cumsum(rng.uniform(0.5, 1.5, num)) * period_s - period_s * rng.uniform(0.5, 1.5)
    values = rng.uniform(-1, 1, num)
    index = np.clip(np.searchsorted(knots, time_s) - 1, 0, num - 2)
    along = np.clip((time_s - knots[index]) / (knots[index + 1] - knots[index]), 0, 1)
    ease = np.clip(along * 1.5, 0, 1)
    ease = ease * ease * (3 - 2 * ease)
    return np.asarray(values[index] * (1 - ease) + values[index + 1] * ease)


def _blinks(rng: np.random.Generator, time_s: NDArray[np.float64]) -> NDArray[np.float64]:
    closed = np.zeros_like(time_s)
    at = rng.uniform(0.1, 2.5)
    while len(time_s) and at < time_s[-1]:
        closing, opening = 0.07, rng.uniform(0.12, 0.2)
        shape = np.where(time_s < at, 1 - (at - time_s) / closing, 1 - np.clip(time_s - at - 0.04, 0, None) / opening)
        closed = np.maximum(closed, np.clip(shape, 0, 1))
        at += rng.choice([0.35, 1.0], p=[0.1, 0.9]) * rng.uniform(1.2, 4.0)
    return closed


def _speech(rng: np.random.Generator, time_s: NDArray[np.float64]) -> NDArray[np.float64]:
    """Jaw opening: syllables of about 5 Hz in phrases with pauses."""
    phrase = np.clip(1.6 * _drift(rng, time_s, 1.2) + 0.7, 0, 1)
    rate = 2 * np.pi * (4.2 + _drift(rng, time_s, 0.8))
    syllables = 0.5 - 0.5 * np.cos(np.cumsum(rate) * (time_s[1] - time_s[0] if len(time_s) > 1 else 0.04))
    stress = 0.55 + 0.45 * _drift(rng, time_s, 0.45)
    return np.asarray(np.clip(phrase * syllables * stress, 0, 1))


def _saccades(rng: np.random.Generator, time_s: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    num = int(time_s[-1] / 0.3) + 4 if len(time_s) else 4
    starts = np.cumsum(rng.uniform(0.3, 1.8, num)) - 1.0
    targets = rng.normal(0, (0.42, 0.28), (num, 2))
    index = np.clip(np.searchsorted(starts, time_s) - 1, 1, num - 1)
    along = np.clip((time_s - starts[index]) / 0.06, 0, 1)[:, None]
    gaze = np.clip(targets[index - 1] * (1 - along) + targets[index] * along, -1, 1)
    return gaze[:, 0], gaze[:, 1]


def _nods(rng: np.random.Generator, time_s: NDArray[np.float64]) -> NDArray[np.float64]:
    at, length = rng.uniform(0, 4), rng.uniform(0.5, 0.9)
    inside = np.clip((time_s - at) % 4.5 / length, 0, 1)
    return np.asarray(np.sin(2 * np.pi * inside) * (1 - inside))
