"""Portraits stand in for output pictures, changed about as much as the model changes them."""

import numpy as np
import pytest

from serving.bench.faces import distinct_faces, shows
from serving.codec import decode, encode
from stages.portraits import load_portrait
from stages.video import square_resize

FACES = distinct_faces(18)


def as_output(face, seed):
    """The portrait moved by up to 12 pixels of 256, blurred, lighter or darker, with noise, and through JPEG."""
    random = np.random.default_rng(seed)
    small = square_resize(load_portrait(face.data, 256), 32)
    moved = np.roll(square_resize(small, 256), random.integers(-12, 13, 2), axis=(0, 1)).astype(float)
    noisy = moved * random.uniform(0.85, 1.15) + random.normal(0, 12, moved.shape)
    return decode(encode(noisy.clip(0, 255).astype(np.uint8), "jpeg"), "jpeg", 256, 256)


@pytest.mark.parametrize("face", FACES, ids=lambda face: face.name)
def test_a_moved_and_blurred_picture_still_shows_its_own_portrait_and_nobody_elses(face):
    for seed in range(5):
        picture = as_output(face, seed)
        assert shows(picture, face, FACES)
        assert not any(shows(picture, other, FACES) for other in FACES if other is not face)


def test_bundled_portraits_come_first_and_as_the_files_that_they_are():
    assert [face.name for face in FACES[:7]] == ["ada", "ben", "emi", "femi", "finn", "nora", "ada-1"]
    assert len({face.data for face in FACES}) == 18


def test_behind_the_last_different_portrait_they_begin_again():
    faces = distinct_faces(20)
    assert [face.data for face in faces[18:]] == [face.data for face in faces[:2]]
    assert shows(as_output(faces[18], 0), faces[18], faces)
