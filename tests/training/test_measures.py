"""Measures against values worked out by hand or by a slow twin."""

from __future__ import annotations

import numpy as np
import pytest

from training import measures


def pictures(seed: int, n: int = 3, height: int = 17, width: int = 23) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, height, width, 3)).astype(np.uint8)


def mean_distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.abs(a.astype(np.float64) - b).mean((1, 2, 3))


def test_psnr_of_a_constant_error_is_its_formula():
    a = np.full((2, 5, 7, 3), 100, np.uint8)
    assert measures.psnr(a, a + 10) == pytest.approx(20 * np.log10(255 / 10))


def test_face_psnr_counts_every_box_alike_and_nothing_outside():
    a = np.zeros((2, 8, 9, 3), np.uint8)
    b = a.copy()
    b[0, 2:4, 3:5] = 30
    b[1, 0, 0] = 255
    boxes = np.array([[3, 2, 5, 4], [4, 4, 8, 8]])
    assert measures.face_psnr(a, b, boxes) == pytest.approx(10 * np.log10(255**2 / (30**2 / 2)))


def test_l1_is_of_pictures_in_0_to_1():
    a = np.zeros((1, 4, 4, 3), np.uint8)
    assert measures.l1(a, a + 51) == pytest.approx(0.2)


def slow_ssim(x: np.ndarray, y: np.ndarray) -> float:
    """One window at a time, one channel at a time."""
    offsets = np.arange(11) - 5
    line = np.exp(-(offsets**2) / (2 * 1.5**2))
    weights = np.outer(line, line) / np.outer(line, line).sum()
    found = []
    for row in range(x.shape[0] - 10):
        for column in range(x.shape[1] - 10):
            for channel in range(3):
                a, b = (p[row : row + 11, column : column + 11, channel].astype(np.float64) for p in (x, y))
                mean_a, mean_b = (weights * a).sum(), (weights * b).sum()
                var_a, var_b = (weights * (a - mean_a) ** 2).sum(), (weights * (b - mean_b) ** 2).sum()
                both = (weights * (a - mean_a) * (b - mean_b)).sum()
                c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
                top = (2 * mean_a * mean_b + c1) * (2 * both + c2)
                found.append(top / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)))
    return float(np.mean(found))


def test_ssim_is_that_of_its_definition():
    a = pictures(0)
    b = np.clip(a.astype(int) + np.random.default_rng(1).integers(-60, 60, a.shape), 0, 255).astype(np.uint8)
    assert measures.ssim(a, b) == pytest.approx(np.mean([slow_ssim(x, y) for x, y in zip(a, b, strict=True)]), abs=1e-9)
    assert measures.ssim(a, a) == pytest.approx(1)


def test_ssim_refuses_pictures_below_its_window():
    with pytest.raises(ValueError, match="11"):
        measures.ssim(pictures(0, height=10), pictures(1, height=10))


def test_tlp_compares_how_neighbouring_frames_differ():
    steady = np.repeat(pictures(0, 1), 4, 0)
    moving = np.stack([np.full((5, 6, 3), 10 * index, np.uint8) for index in range(4)])
    frozen = np.zeros_like(moving)
    assert measures.tlp(steady, steady, mean_distance) == 0
    assert measures.tlp(frozen, moving, mean_distance) == pytest.approx(1000 * 10)
    assert measures.tlp(frozen[:1], moving[:1], mean_distance) == 0


def test_a_blurred_picture_is_less_sharp_and_an_equal_one_as_sharp():
    a = pictures(3)
    blurred = ((a[:, :, :-1].astype(int) + a[:, :, 1:]) // 2).astype(np.uint8)
    assert measures.sharpness(a, a) == pytest.approx(1)
    assert measures.sharpness(blurred, a) < 0.7


def test_flicker_is_of_what_jumps_back_and_not_of_what_moves_on():
    moving = np.stack([np.full((4, 4, 3), 10 * index, np.uint8) for index in range(5)])
    shaky = moving.copy()
    shaky[::2] += 4
    wavy = moving.copy()
    wavy[::2] += 1
    assert measures.flicker(shaky, wavy) == pytest.approx(4)
    assert measures.flicker(moving[:2], moving[:2]) == 1


def test_correlation_and_explained_variance_of_a_scaled_reading_differ():
    true = np.array([0.0, 1.0, 2.0, 5.0])
    assert measures.correlation(true, 0.5 * true + 3) == pytest.approx(1)
    assert measures.explained(true, true) == pytest.approx(1)
    assert measures.explained(true, np.full(4, 2.0)) == pytest.approx(0)
    assert measures.explained(true, 0.5 * true + 3) < 0.8


def test_a_reading_that_never_changes_correlates_with_nothing():
    assert measures.correlation(np.array([0.0, 1.0, 2.0]), np.ones(3)) == 0


def test_verification_of_perfect_embeddings_is_perfect_and_of_equal_ones_is_chance():
    persons = np.array([0, 0, 1, 1, 2, 2, 2])
    perfect = np.eye(3, dtype=np.float32)[persons]
    assert measures.verification(perfect, persons) == {"accuracy": 1.0, "same": 1.0, "other": 0.0}
    assert measures.verification(np.repeat(perfect[:1], 7, 0), persons)["accuracy"] == pytest.approx(0.5)
