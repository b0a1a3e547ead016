"""Augmentation of driving face crops, so that motion tokens carry motion and neither colours nor proportions.

Only what the motion encoder sees is augmented; target, keypoints and reference stay clean. Called by the phases. The
ranges are those of the released training code at strength 1; smaller strengths narrow all of them towards no change.
Crops are uint8 RGB of any size, and everything random comes from the generator passed in. No torch, no Ray.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from stages.messages import Floats, Pixels

MAX_STRETCH = 1.3
MAX_RUN_STRETCH = 1.2
BRIGHTNESS = (0.3, 1.3)
JITTER = 0.3
"""Of contrast and saturation as factors around 1, and of hue as a share of the colour circle."""
NUM_HUES = 180
"""Of a turn around the colour circle, as OpenCV stores hue in 8 bits."""
WARP = (0.02, 0.04)
"""Deviation of the grid's points, as a share of the crop's side."""
NUM_CELLS = 3
"""Per side of that grid."""
NOISE_VARIANCE = (10.0, 50.0)
"""On the scale of 0 to 255."""


def augment_frames(crops: Pixels, rng: np.random.Generator, strength: float = 1.0) -> Pixels:
    """(n, h, w, 3) crops of independent frames, each augmented on its own. `strength` 0 (unchanged) to 1."""
    return np.stack([augment_run(crop[None], rng, strength, MAX_STRETCH)[0] for crop in crops])


def augment_run(
    crops: Pixels, rng: np.random.Generator, strength: float = 1.0, max_stretch: float = MAX_RUN_STRETCH
) -> Pixels:
    """(n, h, w, 3) crops of one run: they share the stretch; colours, warp and noise are drawn per frame."""
    if strength == 0:
        return crops
    is_wide = bool(rng.random() < 0.5)
    factor = 1 + strength * rng.uniform(0, max_stretch - 1)
    return np.stack([_augment(stretch(crop, factor, is_wide), rng, strength) for crop in crops])


def _augment(crop: Pixels, rng: np.random.Generator, strength: float) -> Pixels:
    brightness = 1 + strength * (rng.uniform(*BRIGHTNESS) - 1)
    contrast, saturation = 1 + strength * rng.uniform(-JITTER, JITTER, 2)
    coloured = jitter(crop, brightness, contrast, saturation, strength * rng.uniform(-JITTER, JITTER))
    shifts = rng.standard_normal((NUM_CELLS + 1, NUM_CELLS + 1, 2)) * strength * rng.uniform(*WARP)
    warped = warp(coloured, shifts.astype(np.float32))
    noise = rng.standard_normal(crop.shape, np.float32) * strength * np.sqrt(rng.uniform(*NOISE_VARIANCE))
    return _pixels(warped + noise)


def stretch(crop: Pixels, factor: float, is_wide: bool) -> Pixels:
    """The crop made wider, or else taller, by `factor` >= 1 and cut around its centre to the size it had."""
    height, width = crop.shape[:2]
    wide, tall = (round(width * factor), height) if is_wide else (width, round(height * factor))
    left, top = (wide - width) // 2, (tall - height) // 2
    stretched = cv2.resize(crop, (wide, tall), interpolation=cv2.INTER_LINEAR)
    return np.asarray(stretched[top : top + height, left : left + width], np.uint8)


def jitter(crop: Pixels, brightness: float, contrast: float, saturation: float, hue: float) -> Pixels:
    """Colours changed one after the other: three factors (1: as it is) and turns of the colour circle (0: none)."""
    bright = np.clip(crop * np.float32(brightness), 0, 255)
    grey = cv2.cvtColor(bright, cv2.COLOR_RGB2GRAY).mean()
    contrasted = np.clip(grey + contrast * (bright - grey), 0, 255).astype(np.float32)
    greys = cv2.cvtColor(contrasted, cv2.COLOR_RGB2GRAY)[..., None]
    coloured = _pixels(greys + saturation * (contrasted - greys))
    hsv = cv2.cvtColor(coloured, cv2.COLOR_RGB2HSV)
    hsv[..., 0] = (hsv[..., 0].astype(np.int32) + round(hue * NUM_HUES)) % NUM_HUES
    return np.asarray(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB), np.uint8)


def warp(crop: Pixels, shifts: Floats) -> Pixels:
    """Moves a grid of points by `shifts` (rows + 1, columns + 1, 2), x and y as shares of the sides; affine between."""
    height, width = crop.shape[:2]
    moved = _interpolated(shifts, height, width) * np.array([width, height], np.float32)
    rows, columns = np.mgrid[:height, :width].astype(np.float32)
    x, y = columns + moved[..., 0], rows + moved[..., 1]
    return np.asarray(cv2.remap(crop, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE), np.uint8)


def _interpolated(grid: Floats, height: int, width: int) -> Floats:
    """(height, width, c): every cell of the grid is cut into two triangles, linear in each."""
    row, v = _cells(height, grid.shape[0] - 1)
    column, u = _cells(width, grid.shape[1] - 1)
    row, v, u = row[:, None], v[:, None, None], u[None, :, None]
    corner, opposite = grid[row, column], grid[row + 1, column + 1]
    right, below = grid[row, column + 1], grid[row + 1, column]
    # From the corner along one side, then along the other: which comes first tells the triangles apart.
    over = corner + u * (right - corner) + v * (opposite - right)
    under = corner + v * (below - corner) + u * (opposite - below)
    return np.asarray(np.where(u >= v, over, under), np.float32)


def _cells(num_pixels: int, num_cells: int) -> tuple[NDArray[np.int64], Floats]:
    """The cell of every pixel, and how far it is across that, 0 to 1."""
    place = np.linspace(0, num_cells, num_pixels)
    cell = np.minimum(place.astype(np.int64), num_cells - 1)
    return cell, (place - cell).astype(np.float32)


def _pixels(values: NDArray[np.floating]) -> Pixels:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)
