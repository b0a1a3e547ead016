"""Measures on arrays: how near pictures are to the truth, how steady, how sharp, how well readings follow.

Pure functions; called by `training.evaluate` and `training.probes`. Pictures are uint8 (n, h, w, 3) unless said.
"""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
from numpy.typing import NDArray

from stages.messages import Floats, Pixels

Distance = Callable[[Pixels, Pixels], NDArray[np.floating]]
"""Perceptual distances (n,) between two lots of pictures."""

SSIM_WINDOW_PX, SSIM_SIGMA_PX = 11, 1.5
SSIM_K1, SSIM_K2 = 0.01, 0.03


def psnr(a: Pixels, b: Pixels) -> float:
    """dB from the mean squared error of all pixels; 138 for equal pictures."""
    return _decibels(float(np.mean(_difference(a, b) ** 2)))


def face_psnr(a: Pixels, b: Pixels, boxes: NDArray[np.int64]) -> float:
    """dB inside boxes (n, 4) as x1, y1, x2, y2, from the mean of the boxes' mean squared errors."""
    squares = _difference(a, b) ** 2
    errors = [np.mean(square[y1:y2, x1:x2]) for square, (x1, y1, x2, y2) in zip(squares, boxes, strict=True)]
    return _decibels(float(np.mean(errors)))


def _difference(a: Pixels, b: Pixels) -> Floats:
    return a.astype(np.float32) - b.astype(np.float32)


def _decibels(squared_error: float) -> float:
    return float(10 * np.log10(255**2 / (squared_error + 1e-9)))


def l1(a: Pixels, b: Pixels) -> float:
    """Mean absolute difference of pictures in [0, 1]."""
    return float(np.mean(np.abs(_difference(a, b))) / 255)


def ssim(a: Pixels, b: Pixels) -> float:
    """Structural similarity (Wang et al. 2004), -1 to 1, with a Gaussian window of 11 pixels, sigma 1.5, per channel.

    Windows that reach over the border are left out. Raises ValueError below 11 pixels.
    """
    if min(a.shape[1:3]) < SSIM_WINDOW_PX:
        raise ValueError(f"SSIM needs pictures of at least {SSIM_WINDOW_PX} pixels")
    return float(np.mean([_ssim(x.astype(np.float64), y.astype(np.float64)) for x, y in zip(a, b, strict=True)]))


def _ssim(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    c1, c2 = (SSIM_K1 * 255) ** 2, (SSIM_K2 * 255) ** 2
    mean_x, mean_y = _smooth(x), _smooth(y)
    var_x, var_y = _smooth(x * x) - mean_x**2, _smooth(y * y) - mean_y**2
    covariance = _smooth(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return float(np.mean(luminance * (2 * covariance + c2) / (var_x + var_y + c2)))


def _smooth(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Gaussian mean of every window that lies inside, (h - 10, w - 10, 3)."""
    kernel = cv2.getGaussianKernel(SSIM_WINDOW_PX, SSIM_SIGMA_PX, cv2.CV_64F)
    edge = SSIM_WINDOW_PX // 2
    return np.asarray(cv2.sepFilter2D(x, cv2.CV_64F, kernel, kernel)[edge:-edge, edge:-edge])


def perceptual(a: Pixels, b: Pixels, distance: Distance) -> float:
    """Mean perceptual distance of the frames."""
    return float(np.mean(distance(a, b)))


def tlp(a: Pixels, truth: Pixels, distance: Distance) -> float:
    """Temporal perceptual distance (TecoGAN's tLP) in thousandths: how differently neighbouring frames differ.

    A frozen picture scores well on it: read it beside the other measures only. 0 for a single frame.
    """
    if len(a) < 2:
        return 0.0
    return float(1000 * np.mean(np.abs(distance(a[:-1], a[1:]) - distance(truth[:-1], truth[1:]))))


def sharpness(a: Pixels, ceiling: Pixels) -> float:
    """Gradient energy over that of the ceiling: below 1 blurred, above 1 noisy."""
    return _gradient_energy(a) / max(_gradient_energy(ceiling), 1e-9)


def _gradient_energy(a: Pixels) -> float:
    x = a.astype(np.float32)
    return float(np.mean(np.diff(x, axis=1) ** 2) + np.mean(np.diff(x, axis=2) ** 2))


def flicker(a: Pixels, truth: Pixels) -> float:
    """How much more pixels jump there and back than in the truth: ratio of second differences over time.

    About 1 is calm. Needs three frames; 1 for less.
    """
    if len(a) < 3:
        return 1.0
    return _jitter(a) / max(_jitter(truth), 1e-9)


def _jitter(a: Pixels) -> float:
    x = a.astype(np.float32)
    return float(np.mean(np.abs(x[:-2] - 2 * x[1:-1] + x[2:])))


def correlation(true: NDArray[np.floating], read: NDArray[np.floating]) -> float:
    """Pearson's r of two series (n,); 0 where one of them does not change."""
    a, b = true - np.mean(true), read - np.mean(read)
    size = np.sqrt(np.sum(a * a) * np.sum(b * b))
    return float(np.sum(a * b) / size) if size > 1e-9 else 0.0


def explained(true: NDArray[np.floating], read: NDArray[np.floating]) -> float:
    """R²: 1 for perfect readings, 0 for the mean, negative for worse."""
    spread = float(np.sum((true - np.mean(true)) ** 2))
    return 1 - float(np.sum((true - read) ** 2)) / max(spread, 1e-9)


def mean_cosine(a: Floats, b: Floats) -> float:
    """Mean over all pairs of unit vectors (n, d) and (m, d)."""
    return float(np.mean(a @ b.T))


def verification(embedded: Floats, persons: NDArray[np.int64]) -> dict[str, float]:
    """How well cosines of unit vectors (n, d) tell persons (n,) apart.

    `accuracy` over as many different as equal pairs at the threshold where it is highest, and the mean cosines `same`
    and `other`.
    """
    cosines = embedded @ embedded.T
    first, second = np.triu_indices(len(persons), 1)
    is_same = persons[first] == persons[second]
    same, other = cosines[first, second][is_same], cosines[first, second][~is_same]
    thresholds = np.linspace(-1, 1, 401)
    accepted = 1 - np.searchsorted(np.sort(same), thresholds) / len(same)
    refused = np.searchsorted(np.sort(other), thresholds) / len(other)
    best = float(np.max(accepted + refused) / 2)
    return {"accuracy": best, "same": float(same.mean()), "other": float(other.mean())}
