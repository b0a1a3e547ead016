"""Portraits that can be told apart, and a check whose portrait an output picture shows. Pure but for reading files.

Called by `serving.bench.play`, so that a picture that reached the wrong session is seen. No torch, no Ray.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from stages.messages import Pixels
from stages.portraits import bundled_portraits, load_portrait
from stages.video import square_resize

SIGNATURE_PX = 8
"""A signature is the picture at so many pixels a side: coarse enough not to see how a face moves."""
PORTRAIT_PX = 512
NUM_COLOURINGS = 3
"""As they are, and with red, green and blue changed round in two ways."""

Signature = NDArray[np.float32]


@dataclass(frozen=True)
class Face:
    """One session's portrait."""

    name: str
    data: bytes
    """The picture file for the hello."""
    signature: Signature


def distinct_faces(num_faces: int) -> list[Face]:
    """So many portraits: the bundled ones, then the same in other colours; behind 18 they begin again."""
    files = bundled_portraits()
    faces = []
    for number in range(num_faces):
        name, colouring = list(files)[number % len(files)], number // len(files) % NUM_COLOURINGS
        rgb = np.roll(load_portrait(files[name].read_bytes(), PORTRAIT_PX), colouring, axis=2)
        data = _as_png(rgb) if colouring else files[name].read_bytes()
        faces.append(Face(f"{name}-{colouring}" if colouring else name, data, signature(rgb)))
    return faces


def signature(rgb: Pixels) -> Signature:
    """What is compared of a picture of any size."""
    return square_resize(rgb, SIGNATURE_PX).astype(np.float32)


def shows(rgb: Pixels, own: Face, faces: Sequence[Face]) -> bool:
    """Whether a picture is nearer to a session's own portrait than to that of any other session."""
    seen = signature(rgb)
    return _distance(seen, own.signature) <= min(_distance(seen, face.signature) for face in faces)


def _distance(one: Signature, other: Signature) -> float:
    return float(np.square(one - other).mean())


def _as_png(rgb: Pixels) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
