"""ID-SIM as on real faces: an ArcFace network given by path. Called by `training.evaluate --identity-model`."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from stages.errors import BadWeights
from stages.messages import Floats, Pixels

POINTS = (5, 6, 12, 3, 4)
"""Eyes, tip of the nose and corners of the mouth among the world's keypoints."""
PLACES_PX = ((38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366), (41.5493, 92.3655), (70.7299, 92.2041))
"""Where ArcFace expects them in a face of 112 x 112."""


class ArcFace:
    """An ArcFace network as an ONNX file, run by OpenCV. None is bundled."""

    def __init__(self, path: Path):
        """Raises BadWeights."""
        try:
            self.network = cv2.dnn.readNetFromONNX(str(path))
        except cv2.error as error:
            raise BadWeights(f"{path} is not an ONNX network that OpenCV reads: give an ArcFace model") from error

    def embed(self, pictures: Pixels, points: Floats) -> Floats:
        """Unit vectors (n, d) of pictures (n, s, s, 3) with keypoints (n, K, 2) of the world, [-1, 1] across."""
        faces = [aligned(picture, own) for picture, own in zip(pictures, points, strict=True)]
        found = []
        for face in faces:
            self.network.setInput(cv2.dnn.blobFromImage(face, 1 / 127.5, mean=(127.5, 127.5, 127.5)))
            found.append(self.network.forward()[0])
        vectors = np.stack(found)
        return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)


def aligned(picture: Pixels, points: Floats) -> Pixels:
    """The face (112, 112, 3) as ArcFace wants it: eyes, nose and mouth at their places, by the best similarity."""
    start = (points[list(POINTS)] + 1) * len(picture) / 2 - 0.5
    one, zero = np.ones(len(start)), np.zeros(len(start))
    x, y = start.T
    rows = np.concatenate([np.stack([x, -y, one, zero], 1), np.stack([y, x, zero, one], 1)])
    a, b, right, down = np.linalg.lstsq(rows, np.array(PLACES_PX).T.ravel(), rcond=None)[0]
    return np.asarray(cv2.warpAffine(picture, np.array(((a, -b, right), (b, a, down))), (112, 112)), np.uint8)
