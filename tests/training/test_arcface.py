"""ArcFace: faces where it expects them, and no file that is none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from stages.errors import BadWeights
from training.arcface import ArcFace, aligned
from training.trials import make_cast, project_all


def test_a_face_is_aligned_to_where_arcface_expects_it():
    cast = make_cast(0, 0, 2)
    points = project_all(cast.person, cast.shown)[0, :, :2]
    picture = np.zeros((256, 256, 3), np.uint8)
    column, row = np.round((points[12] + 1) * 128 - 0.5).astype(int)
    picture[row - 2 : row + 3, column - 2 : column + 3] = 255
    rows, columns = np.nonzero(aligned(picture, points)[..., 0])
    assert abs(columns.mean() - 56) < 12 and abs(rows.mean() - 72) < 12


def test_a_file_that_is_no_network_is_refused(tmp_path: Path):
    (tmp_path / "face.onnx").write_bytes(b"nothing")
    with pytest.raises(BadWeights, match=r"face\.onnx"):
        ArcFace(tmp_path / "face.onnx")
