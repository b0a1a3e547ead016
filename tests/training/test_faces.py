from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from stages.messages import Pixels
from training.faces import (
    BadDetector,
    Detector,
    Parts,
    Window,
    area,
    around,
    choose,
    load_detector,
    overlap,
    parts_of_landmarks,
    parts_of_yunet,
    search_windows,
)
from training.identity import sample_identity
from training.motion import Motion, sample_portrait_motion
from training.world import feature_boxes, render

SIZE = 192


@pytest.fixture(scope="module")
def bundled() -> Detector:
    return load_detector()


def drawn(seed: int, size: int = SIZE) -> tuple[Pixels, dict[str, np.ndarray]]:
    identity, motion = sample_identity(seed), sample_portrait_motion(np.random.default_rng(seed))
    assert isinstance(motion, Motion)
    return render(identity, motion, size), feature_boxes(identity, motion, size)


def parts(x: float, size: float) -> Parts:
    """A face of some size at x, 50, all parts alike."""
    half = size / 2
    return np.tile(np.array((x - half, 50 - half, x + half, 50 + half), np.float32), (4, 1))


def holds(box: np.ndarray, point: np.ndarray) -> bool:
    return bool((box[:2] <= point).all() and (point <= box[2:]).all())


def test_the_bundled_extractor_finds_drawn_heads_eyes_and_mouths(bundled: Detector) -> None:
    for seed in range(6):
        picture, truth = drawn(seed)
        found = choose(bundled(picture, None), None)
        assert found is not None
        assert overlap(found[0], truth["face"].astype(np.float32)) > 0.6
        for row, name in enumerate(("left_eye", "right_eye", "mouth"), start=1):
            middle = (truth[name][:2] + truth[name][2:]) / 2
            assert holds(found[row], middle), (seed, name)


def test_a_head_at_the_side_of_a_wide_picture_is_found_at_its_place(bundled: Detector) -> None:
    picture, truth = drawn(2)
    wide = np.full((SIZE, 481, 3), 90, np.uint8)
    wide[:, 481 - SIZE :] = picture
    found = choose(bundled(wide, None), None)
    assert found is not None
    assert overlap(found[0], truth["face"].astype(np.float32) + np.float32((289, 0, 289, 0))) > 0.5


def test_a_followed_head_stays_where_it_is(bundled: Detector) -> None:
    picture, _ = drawn(3)
    first = choose(bundled(picture, None), None)
    again = choose(bundled(picture, first), first)
    assert first is not None and again is not None
    assert overlap(first[0], again[0]) > 0.8


@pytest.mark.parametrize("picture", ["plain", "noise", "strip"])
def test_a_picture_without_a_face_has_none(bundled: Detector, picture: str) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (121, 163, 3), np.uint8)
    pictures = {"plain": np.full((121, 163, 3), 130, np.uint8), "noise": noise, "strip": noise[:, :7]}
    assert bundled(pictures[picture], None) == []


def test_the_largest_face_is_chosen_and_then_followed() -> None:
    small, large = parts(100, 30), parts(300, 60)
    assert choose([], None) is None
    assert choose([small, large], None) is large
    assert choose([small, large], parts(103, 30)) is small
    assert choose([small, large], parts(600, 30)) is large


def test_overlap_is_the_shared_part_of_the_union() -> None:
    one = np.array((0, 0, 4, 2), np.float32)
    assert area(one) == 8
    assert overlap(one, one) == 1
    assert overlap(one, np.array((2, 0, 6, 2), np.float32)) == pytest.approx(4 / 12)
    assert overlap(one, np.array((9, 9, 10, 10), np.float32)) == 0


def test_windows_lie_in_the_picture() -> None:
    picture = np.zeros((90, 200, 3), np.uint8)
    window = around(np.array((170, -20, 230, 40), np.float32), picture)
    assert window == Window(114, 0, 86)
    windows = search_windows(90, 200)
    assert windows[:3] == [Window(0, 0, 90), Window(55, 0, 90), Window(110, 0, 90)]
    assert all(window.of(picture).shape == (window.side, window.side, 3) for window in windows)
    assert len(search_windows(100, 100)) == 10


def test_the_five_points_of_yunet_become_boxes_of_a_usual_face() -> None:
    row = np.array((20, 30, 60, 80, 35, 60, 65, 60, 50, 75, 40, 92, 60, 92, 0.9), np.float32)
    face, left_eye, right_eye, mouth = parts_of_yunet(row)
    assert face.tolist() == [20, 6, 80, 110]
    assert (left_eye[[0, 2]].mean(), right_eye[[0, 2]].mean()) == (35, 65)
    assert holds(mouth, np.array((50, 92))) and mouth[1] > left_eye[3]


def test_a_turned_heads_eye_boxes_of_yunet_keep_their_size() -> None:
    row = np.array((20, 30, 60, 80, 35, 60, 65, 60, 50, 75, 40, 92, 60, 92, 0.9), np.float32)
    turned = row.copy()
    turned[[6, 12]] = (45, 50)
    frontal, side = parts_of_yunet(row)[1], parts_of_yunet(turned)[1]
    assert side[2] - side[0] == pytest.approx(frontal[2] - frontal[0], rel=0.1)


def test_landmarks_of_the_mesh_become_boxes() -> None:
    points = np.tile(np.float32((50, 50)), (478, 1))
    points[10], points[152], points[234], points[454] = (50, 10), (50, 90), (20, 50), (80, 50)
    points[226], points[245], points[446], points[465] = (30, 40), (45, 44), (72, 40), (56, 44)
    points[61], points[291], points[17] = (40, 70), (60, 70), (50, 78)
    face, left_eye, right_eye, mouth = parts_of_landmarks(points)
    assert face.tolist() == [20, -14, 80, 90]
    assert (left_eye[0], right_eye[2], mouth[3]) == (30, 72, 78)


def test_a_missing_model_is_named_with_what_it_should_be(tmp_path: Path) -> None:
    with pytest.raises(BadDetector, match=r"nowhere.onnx is not there: give the path of a YuNet model"):
        load_detector(yunet=str(tmp_path / "nowhere.onnx"))
    with pytest.raises(BadDetector, match=r"nowhere.task is not there: give the path of a FaceLandmarker model"):
        load_detector(landmarks=str(tmp_path / "nowhere.task"))


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_text("nothing")
    with pytest.raises(BadDetector, match="not a YuNet model"):
        load_detector(yunet=str(path))


def test_two_detectors_at_once_are_refused() -> None:
    with pytest.raises(BadDetector, match="keep one"):
        load_detector("a", "b")


@pytest.mark.skipif(importlib.util.find_spec("mediapipe") is not None, reason="MediaPipe is installed")
def test_landmarks_without_mediapipe_say_how_to_get_it(tmp_path: Path) -> None:
    path = tmp_path / "face.task"
    path.write_text("nothing")
    with pytest.raises(BadDetector, match="pip install mediapipe"):
        load_detector(landmarks=str(path))
