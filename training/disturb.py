"""Pictures as cameras see them, with what is true of them following: for the networks that look at driving frames.

Zoomed, shifted, turned, in other light and colours, blurred and noisy, or without a person at all. Called by phase
`keypoints`.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from stages.messages import Pixels
from training.identity import sample_identity
from training.world import backdrop


def reframe(
    picture: Pixels, pose: NDArray[np.float32], image_px: int, rng: np.random.Generator, strength: float = 1.0
) -> tuple[Pixels, NDArray[np.float32]]:
    """Zoomed, shifted and turned in the picture plane, with its pose (pitch, yaw, roll, x, y, scale) following."""
    zoom, angle = float(np.exp(strength * rng.uniform(-0.45, 0.45))), float(strength * rng.normal(0, 7))
    shift = strength * rng.uniform(-0.25, 0.25, 2)
    turn = zoom * np.array(((np.cos(r := np.radians(angle)), -np.sin(r)), (np.sin(r), np.cos(r))))
    half, out = picture.shape[0] / 2, image_px / 2
    # Pixel centres: p = half · (u + 1) - 0.5 for a place u in [-1, 1].
    linear = turn * (out / half)
    offset = out * (shift + 1) - 0.5 - linear @ np.full(2, half - 0.5)
    border = int(rng.choice([cv2.BORDER_REPLICATE, cv2.BORDER_REFLECT, cv2.BORDER_CONSTANT]))
    filling = tuple(float(v) for v in rng.integers(0, 256, 3))
    source: NDArray[Any] = cv2.blur(picture, (2, 2)) if zoom < 0.8 else picture
    moved = cv2.warpAffine(
        source,
        np.column_stack((linear, offset)),
        (image_px, image_px),
        flags=cv2.INTER_LINEAR,
        borderMode=border,
        borderValue=filling,
    )
    placed = turn @ pose[3:5] + shift
    changed = np.array((pose[0], pose[1], pose[2] + angle, *placed, pose[5] * zoom), np.float32)
    return np.asarray(moved, np.uint8), changed


def degrade(picture: Pixels, rng: np.random.Generator) -> Pixels:
    """Other light, colours, sharpness and noise, as cameras have them."""
    x: NDArray[Any] = picture.astype(np.float32) / 255
    if rng.random() < 0.15:
        x = x[..., rng.permutation(3)]
    if rng.random() < 0.15:
        x = np.repeat(x.mean(-1, keepdims=True), 3, -1)
    if rng.random() < 0.7:
        x = x * rng.uniform(0.65, 1.25, 3).astype(np.float32)
        x = (x - 0.5) * rng.uniform(0.5, 1.3) + 0.5 + rng.uniform(-0.15, 0.15)
    if rng.random() < 0.4:
        x = cv2.GaussianBlur(np.ascontiguousarray(x), (0, 0), rng.uniform(0.3, 1.6))
    if rng.random() < 0.5:
        x = x + rng.normal(0, rng.uniform(0.005, 0.07), x.shape).astype(np.float32)
    return np.asarray(np.clip(x, 0, 1) * 255 + 0.5, np.uint8)


def empty_picture(size: int, rng: np.random.Generator) -> Pixels:
    """A picture without a person: plain, a backdrop, smooth or rough noise, shapes."""
    kind = int(rng.integers(5))
    canvas: NDArray[Any] = np.ones((size, size, 3), np.float32) * rng.uniform(0, 1, 3).astype(np.float32)
    if kind == 0:
        # Covered lenses and black starts of films matter more than other plain pictures.
        canvas[:] = rng.choice([0.0, 0.5, 1.0, float(rng.uniform(0, 1))], p=[0.5, 0.1, 0.2, 0.2])
        return np.asarray(canvas * 255, np.uint8)
    if kind == 1:
        canvas = backdrop(sample_identity(int(rng.integers(100_000))), size).copy()
    if kind in (2, 3):
        coarse = rng.uniform(0, 1, (int(rng.integers(2, 12)),) * 2 + (3,)).astype(np.float32)
        canvas = cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC if kind == 2 else cv2.INTER_NEAREST)
    if kind == 4:
        canvas = rng.uniform(0, 1, canvas.shape).astype(np.float32)
    for _ in range(int(rng.integers(0, 5))):
        centre, axes = rng.integers(0, size, 2).tolist(), rng.integers(2, size // 3, 2).tolist()
        colour = tuple(float(v) for v in rng.uniform(0, 1, 3))
        if rng.random() < 0.5:
            cv2.rectangle(canvas, centre, (np.array(centre) + axes).tolist(), colour, -1)
        else:
            cv2.line(canvas, centre, rng.integers(0, size, 2).tolist(), colour, int(rng.integers(1, 9)), cv2.LINE_AA)
    return np.asarray(np.clip(canvas, 0, 1) * 255, np.uint8)


def displaced_face(
    picture: Pixels, box: NDArray[np.int64], crop_px: int, rng: np.random.Generator, strength: float = 1.0
) -> Pixels:
    """The face box (4,), displaced and resized as boxes of people whom the extractor has not learned are: by a tenth of
    their side at `strength` 1; scaled to (crop_px, crop_px, 3)."""
    side = max(int(box[2] - box[0]), 8)
    shift, growth = rng.normal(0, 0.06, 2) * side * strength, rng.normal(0.02, 0.06, 2) * side * strength
    moved = np.round(box + np.concatenate([shift - growth, shift + growth])).astype(int)
    low, high = np.clip(moved[:2], 0, picture.shape[0] - 8), np.minimum(moved[2:], picture.shape[0])
    high = np.maximum(high, low + 8)
    part = picture[low[1] : high[1], low[0] : high[0]]
    return np.asarray(cv2.resize(part, (crop_px, crop_px), interpolation=cv2.INTER_LINEAR), np.uint8)
