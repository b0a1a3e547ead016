"""The painted face: brows, eyes, mouth, freckles, beard as seen from straight ahead. Called by `training.world`.

Everything is drawn flat in head units and laid over the head's surface afterwards, so it turns with the head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from training.identity import Colour, Identity
from training.motion import Motion

Map = NDArray[Any]
"""Values per pixel of the painted square: float32 colours, or a uint8 or float32 mask of 0 to 255."""
LEFT, TOP, SPAN = -1.15, -1.05, 2.4
"""The painted square in head units."""
_SHIFT = 5


@dataclass(frozen=True)
class MouthShape:
    """Where the lips are, in head units: half width, corner height and the middle heights of the four lip lines."""

    half_width: float
    corner_y: float
    upper_out: float
    upper_in: float
    lower_in: float
    lower_out: float


def mouth_shape(identity: Identity, motion: Motion) -> MouthShape:
    """The lips of this person in this motion."""
    half = identity.mouth_width * (1 + 0.22 * motion.mouth_wide + 0.14 * motion.smile) * (1 - 0.10 * motion.jaw)
    pucker = 1 + 0.45 * max(-motion.mouth_wide, 0)
    y, lip = identity.mouth_y, identity.lip * pucker * (1 - 0.15 * max(motion.smile, 0))
    gap = 0.30 * motion.jaw + 0.05 * max(motion.smile - 0.45, 0)
    upper_in = y - 0.12 * gap
    lower_in = y + 0.88 * gap
    corner = y - 0.085 * motion.smile + 0.28 * gap
    return MouthShape(half, corner, upper_in - lip, upper_in, lower_in, lower_in + 1.25 * lip)


def eye_centres(identity: Identity) -> NDArray[np.float64]:
    """(2, 2) x, y of the eyes, the one on the picture's left first."""
    return np.array(((-identity.eye_spacing, identity.eye_y), (identity.eye_spacing, identity.eye_y)))


def mouth_lines(identity: Identity, motion: Motion, x: NDArray[np.float64]) -> list[NDArray[np.float64]]:
    """Heights of the four lip lines, from top to bottom, at places `x` of -1 to 1 across the mouth."""
    shape, arch = mouth_shape(identity, motion), 1 - x * x
    bow = 0.18 * identity.lip * np.exp(-((x / 0.16) ** 2))
    return [
        shape.corner_y + (shape.upper_out - shape.corner_y) * arch**0.8 + bow,
        shape.corner_y + (shape.upper_in - shape.corner_y) * arch,
        shape.corner_y + (shape.lower_in - shape.corner_y) * arch,
        shape.corner_y + (shape.lower_out - shape.corner_y) * arch**0.75,
    ]


def eye_lines(identity: Identity, motion: Motion, side: int, x: NDArray[np.float64]) -> list[NDArray[np.float64]]:
    """Heights of the lid's crease, the upper and the lower rim, at places `x` of -1 to 1 across the eye."""
    upper, lower = (rim + identity.eye_y for rim in _lids(identity, motion, side, x))
    return [_crease(identity, upper, eye_height(identity, motion)), upper, lower]


def eye_height(identity: Identity, motion: Motion) -> float:
    """From the middle of an eye that is not blinking to its upper rim."""
    return identity.eye_size * identity.eye_open * (1 + 0.16 * max(motion.brow, 0))


def gaze_at(identity: Identity, motion: Motion) -> NDArray[np.float64]:
    """(2,) from the middle of an eye to the middle of its iris."""
    tall = eye_height(identity, motion)
    return np.array((0.5 * identity.eye_size * motion.gaze_x, -0.06 * tall + 0.5 * tall * motion.gaze_y))


def chin_drop(motion: Motion) -> float:
    """How much lower the chin is than with the mouth shut."""
    return 0.15 * motion.jaw


def brow_lift(motion: Motion) -> float:
    """How much higher the brows are than at rest."""
    return 0.085 * motion.brow * (1.0 if motion.brow > 0 else 0.75)


def _lids(
    identity: Identity, motion: Motion, side: int, x: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Heights of the upper and the lower rim, from the middle of the eye."""
    closed = motion.blink_left if side < 0 else motion.blink_right
    half, tall = identity.eye_size, eye_height(identity, motion)
    squint = 0.3 * max(motion.smile, 0)
    arch = (1 - x * x) ** 0.75
    tilt = -identity.eye_tilt * half * x * side
    upper = -tall * arch * (1 - 1.28 * closed) + tilt
    lower = tall * arch * (0.62 - 0.34 * squint) + tilt
    return np.minimum(upper, lower), lower


def _crease(identity: Identity, rim: NDArray[np.float64], tall: float) -> NDArray[np.float64]:
    return np.asarray(np.minimum(rim - 0.028, rim * 0.35 + 0.65 * (identity.eye_y - tall) - 0.02))


def paint_face(identity: Identity, motion: Motion, size: int) -> NDArray[np.uint8]:
    """(size, size, 4) straight-alpha RGBA over the square from (LEFT, TOP) of side SPAN."""
    canvas = _Canvas(size)
    _paint_complexion(canvas, identity)
    _paint_nose(canvas, identity)
    _paint_mouth(canvas, identity, motion)
    for side in (-1, 1):
        _paint_eye(canvas, identity, motion, side)
        _paint_brow(canvas, identity, motion, side)
    return np.dstack((canvas.colour, canvas.alpha)).clip(0, 255).astype(np.uint8)


class _Canvas:
    """Float RGB with alpha, filled through anti-aliased masks."""

    def __init__(self, size: int):
        self.size, self.per_unit = size, size / SPAN
        self.colour: Map = np.zeros((size, size, 3), np.float32)
        self.alpha: Map = np.zeros((size, size), np.float32)

    def points(self, points: NDArray[np.float64]) -> NDArray[np.int32]:
        return np.round((points - (LEFT, TOP)) * self.per_unit * 2**_SHIFT).astype(np.int32)

    def mask(self, points: NDArray[np.float64]) -> Map:
        blank = np.zeros((self.size, self.size), np.uint8)
        return cv2.fillPoly(blank, [self.points(points)], 255, cv2.LINE_AA, _SHIFT)

    def paint(self, mask: Map, colour: Colour | NDArray[np.float64], opacity: float = 1.0) -> None:
        ys, xs = _extent(mask)
        weight = mask[ys, xs].astype(np.float32) * (opacity / 255)
        alpha = self.alpha[ys, xs] / 255
        total = weight + alpha * (1 - weight)
        ratio = (weight / np.maximum(total, 1e-4))[..., None]
        block = self.colour[ys, xs]
        block += ratio * (np.asarray(colour, np.float32) * 255 - block)
        self.alpha[ys, xs] = total * 255

    def fill(self, points: NDArray[np.float64], colour: Colour | NDArray[np.float64], opacity: float = 1.0) -> None:
        self.paint(self.mask(points), colour, opacity)

    def glow(
        self, x: float, y: float, rx: float, ry: float, colour: Colour | NDArray[np.float64], opacity: float
    ) -> None:
        """A soft blob."""
        place = np.linspace(0, SPAN, self.size, dtype=np.float32)
        gx, gy = np.exp(-(((place + LEFT - x) / rx) ** 2)), np.exp(-(((place + TOP - y) / ry) ** 2))
        blob = np.outer(gy, gx) * 255
        self.paint(np.where(blob < 3, 0, blob).astype(np.float32), colour, opacity)


def _extent(mask: Map) -> tuple[slice, slice]:
    x, y, w, h = cv2.boundingRect(mask if mask.dtype == np.uint8 else (mask > 0).astype(np.uint8))
    return slice(y, y + h), slice(x, x + w)


def _paint_complexion(canvas: _Canvas, identity: Identity) -> None:
    rosy = np.array(identity.skin) * (1.0, 0.72, 0.68)
    for side in (-1, 1):
        canvas.glow(side * 0.42, 0.24, 0.2, 0.17, rosy, 0.55 * identity.blush)
        canvas.glow(side * identity.eye_spacing, identity.eye_y, 0.22, 0.17, np.array(identity.skin) * 0.72, 0.35)
    if identity.freckles:
        rng = np.random.default_rng([identity.seed, 2])
        spots = rng.normal((0, 0.16), (0.3, 0.09), (int(40 * identity.freckles), 2))
        for spot, radius in zip(spots, rng.uniform(0.008, 0.017, len(spots)), strict=True):
            canvas.fill(_oval(spot[0], spot[1], radius, radius, 8), np.array(identity.skin) * (0.8, 0.66, 0.58), 0.6)


def _paint_nose(canvas: _Canvas, identity: Identity) -> None:
    y, w = identity.eye_y + identity.nose_length, identity.nose_width
    canvas.glow(0, y + 0.105, w * 0.9, 0.05, np.array(identity.skin) * (0.72, 0.6, 0.58), 0.55)
    for side in (-1, 1):
        canvas.fill(
            _oval(side * w * 0.52, y + 0.075, w * 0.27, 0.023, 14), np.array(identity.skin) * (0.42, 0.3, 0.28), 0.8
        )


def _paint_mouth(canvas: _Canvas, identity: Identity, motion: Motion) -> None:
    shape = mouth_shape(identity, motion)
    x = np.linspace(-1, 1, 25)
    lines = mouth_lines(identity, motion, x)
    upper_out, upper_in, lower_in, lower_out = (np.stack((x * shape.half_width, y), 1) for y in lines)
    lip = np.array(identity.lip_colour)
    canvas.glow(0, shape.lower_out + 0.06, 0.15, 0.035, np.array(identity.skin) * (0.78, 0.68, 0.66), 0.6)
    canvas.fill(np.concatenate((upper_out, lower_out[::-1])), lip * 0.92)
    canvas.fill(np.concatenate((lower_in, lower_out[::-1])), np.clip(lip * 1.1, 0, 1))
    inner = np.concatenate((upper_in, lower_in[::-1]))
    if shape.lower_in - shape.upper_in > 0.012:
        _paint_inside(canvas, inner, shape)
    crease = np.concatenate((upper_in, upper_in[::-1] + np.array((0, 0.014))))
    canvas.fill(crease, lip * 0.42, 0.75)


def _paint_inside(canvas: _Canvas, inner: NDArray[np.float64], shape: MouthShape) -> None:
    opening = canvas.mask(inner)
    canvas.paint(opening, (0.20, 0.05, 0.06))
    gap = shape.lower_in - shape.upper_in
    tongue = canvas.mask(_oval(0, shape.lower_in + 0.01, shape.half_width * 0.62, 0.36 * gap, 20))
    canvas.paint(cv2.min(tongue, opening), (0.72, 0.30, 0.32))
    teeth = canvas.mask(_oval(0, shape.upper_in - 0.02, shape.half_width * 0.8, 0.03 + min(0.3 * gap, 0.06), 24))
    canvas.paint(cv2.min(teeth, opening), (0.96, 0.95, 0.92))


def _paint_eye(canvas: _Canvas, identity: Identity, motion: Motion, side: int) -> None:
    closed = motion.blink_left if side < 0 else motion.blink_right
    half = identity.eye_size
    tall = eye_height(identity, motion)
    x = np.linspace(-1, 1, 21)
    upper, lower = _lids(identity, motion, side, x)
    centre = np.array((side * identity.eye_spacing, identity.eye_y))
    rim_up, rim_low = (np.stack((x * half, y), 1) + centre for y in (upper, lower))
    _paint_lid(canvas, identity, rim_up, tall, closed)
    _paint_ball(canvas, identity, motion, canvas.mask(np.concatenate((rim_up, rim_low[::-1]))), centre, half, tall)
    dark = 0.25 * np.array(identity.hair) + 0.05
    weight = half * (0.09 + 0.12 * identity.lash)
    outer = np.stack((x * half * 1.06, upper - weight * (0.35 + 0.65 * np.clip(x * side, 0, 1))), 1) + centre
    canvas.fill(np.concatenate((outer, rim_up[::-1])), dark)
    canvas.fill(np.concatenate((rim_low, rim_low[::-1] + np.array((0, 0.012)))), np.array(identity.skin) * 0.5, 0.55)


def _paint_lid(canvas: _Canvas, identity: Identity, rim: NDArray[np.float64], tall: float, closed: float) -> None:
    crease = rim.copy()
    crease[:, 1] = _crease(identity, rim[:, 1], tall)
    lid = np.array(identity.skin) * (0.86, 0.78, 0.77)
    canvas.fill(np.concatenate((crease, rim[::-1])), lid, 0.55 + 0.4 * closed)
    canvas.fill(
        np.concatenate((crease, crease[::-1] + np.array((0, 0.012)))), np.array(identity.skin) * (0.55, 0.45, 0.43), 0.6
    )


def _paint_ball(
    canvas: _Canvas,
    identity: Identity,
    motion: Motion,
    opening: Map,
    centre: NDArray[np.float64],
    half: float,
    tall: float,
) -> None:
    canvas.paint(opening, (0.95, 0.94, 0.93))
    x, y = centre + gaze_at(identity, motion)
    radius = 0.56 * half
    discs = (
        (radius, np.array(identity.iris) * 0.45),
        (radius * 0.86, np.array(identity.iris)),
        (radius * 0.45, np.full(3, 0.03)),
    )
    for size, colour in discs:
        canvas.paint(cv2.min(canvas.mask(_oval(x, y, size, size, 28)), opening), colour)
    glow = canvas.mask(_oval(x, y + radius * 0.45, radius * 0.55, radius * 0.28, 16))
    canvas.paint(cv2.min(glow, opening), np.clip(np.array(identity.iris) * 1.5 + 0.08, 0, 1), 0.55)
    spark = canvas.mask(
        _oval(x + radius * 0.3 * np.sign(identity.light[0]), y - radius * 0.35, radius * 0.22, radius * 0.22, 12)
    )
    canvas.paint(cv2.min(spark, opening), (1.0, 1.0, 1.0), 0.95)
    shade = canvas.mask(_oval(centre[0], centre[1] - tall * 1.05, half * 1.1, tall * 0.6, 20))
    canvas.paint(cv2.min(shade, opening), (0.15, 0.1, 0.1), 0.3)


def _paint_brow(canvas: _Canvas, identity: Identity, motion: Motion, side: int) -> None:
    x = np.linspace(0, 1, 15)
    raised = brow_lift(motion)
    inner_drop = 0.05 * max(-motion.brow, 0)
    y = (
        identity.brow_y
        - raised
        - 0.06 * np.sin(np.pi * np.clip(x * 0.9 + 0.12, 0, 1))
        + identity.brow_tilt * (0.5 - x) * 0.5
    )
    y = y + inner_drop * (1 - x) ** 2
    start, end = identity.eye_spacing - 0.17, identity.eye_spacing + 0.2
    px = side * (start + (end - start) * x)
    weight = identity.brow_weight * (1 - 0.75 * x**2) * np.clip(0.55 + 5 * x, 0, 1)
    colour = 0.72 * np.array(identity.hair) + 0.02 + 0.08 * np.array(identity.skin)
    top, bottom = np.stack((px, y - weight / 2), 1), np.stack((px, y + weight / 2), 1)
    canvas.fill(np.concatenate((top, bottom[::-1])), colour, 0.92)


def _oval(x: float, y: float, rx: float, ry: float, num: int) -> NDArray[np.float64]:
    angle = np.linspace(0, 2 * np.pi, num, endpoint=False)
    return np.stack((x + rx * np.cos(angle), y + ry * np.sin(angle)), 1)
