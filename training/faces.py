"""Finds faces and their parts in pictures of any size, for `training.prepare`, with one of three detectors:

- the bundled keypoint extractor (default, no download): centred or roughly centred heads of some size, one per look;
- YuNet through OpenCV, by path: faces of any place and size, five landmarks;
- MediaPipe's FaceLandmarker, by path and where `mediapipe` is installed: 478 landmarks, the tightest boxes.

All say the same thing of a face: `Parts`, float (4, 4), rows `PARTS`, columns x1, y1, x2, y2 in pixels of the picture.
The row `face` holds the head from crown to chin, as in drawn clips. *Left* and *right* are those of the picture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from einops import rearrange

from stages.config import KeypointConfig
from stages.errors import UserError
from stages.images import signed
from stages.keypoints import pose_from_raw, posed_keypoints
from stages.messages import Floats, Pixels
from stages.networks.keypoint_extractor import KeypointExtractor
from stages.pipeline import load_networks

Parts = Floats
Detector = Callable[[Pixels, Parts | None], list[Parts]]
"""Picture uint8 (h, w, 3) and the face of the frame before, if any, to the faces in it."""

PARTS = ("face", "left_eye", "right_eye", "mouth")

LEFT_EYE, RIGHT_EYE, MOUTH = (5,), (6,), (3, 4, 11, 13)
"""The bundled extractor's keypoints (`training.world.canonical_keypoints`)."""
HEAD_SHARE = 0.7
"""Of a window's side, by which the extractor works best: what heads of the world take up."""
MIN_HEAD_SHARE, MAX_HEAD_SHARE = 0.3, 1.1
SAME_FACE = 0.5
"""Overlap (intersection over union) from which on two looks have seen the same face."""

YUNET_MIN_SCORE, YUNET_OVERLAP, YUNET_MAX_FACES = 0.7, 0.3, 50
YUNET_SIDE_PX = 640
"""Larger pictures are made smaller: YuNet knows faces up to about 300 pixels."""
CROWN_SHARE = 0.3
"""By how much of its height a box from forehead to chin grows upwards to hold the crown."""

LANDMARK_LEFT_EYE, LANDMARK_RIGHT_EYE = (226, 230, 223, 245), (446, 450, 465, 443)
LANDMARK_LIPS = (61, 146, 91, 181, 84, 17, 314, 405, 321, 375, 291, 409, 270, 269, 267, 0, 37, 39, 40, 185)
MAX_LANDMARK_FACES = 4


class BadDetector(UserError):
    """A face detector that cannot be loaded."""

    code = "bad_detector"


@dataclass(frozen=True)
class Window:
    """A square part of a picture, in pixels."""

    x: int
    y: int
    side: int

    def of(self, rgb: Pixels) -> Pixels:
        """What of the picture is in it."""
        return rgb[self.y : self.y + self.side, self.x : self.x + self.side]


def load_detector(yunet: str = "", landmarks: str = "") -> Detector:
    """The detector of a model's path, or the bundled one without a path. Raises BadDetector."""
    if yunet and landmarks:
        raise BadDetector("two detectors were given: keep one of --detector and --landmarks")
    if yunet:
        return load_yunet(yunet)
    return load_landmarks(landmarks) if landmarks else load_keypoints()


def choose(faces: Sequence[Parts], last: Parts | None) -> Parts | None:
    """The face to follow: the one seen before if it is there, else the largest; None where there is none."""
    if not faces:
        return None
    if last is not None:
        nearest = max(faces, key=lambda parts: overlap(parts[0], last[0]))
        if overlap(nearest[0], last[0]) >= SAME_FACE:
            return nearest
    return max(faces, key=lambda parts: area(parts[0]))


def area(box: Floats) -> float:
    """Square pixels of a box (4,)."""
    return float(max(box[2] - box[0], 0) * max(box[3] - box[1], 0))


def overlap(one: Floats, other: Floats) -> float:
    """Intersection over union of two boxes (4,), 0 to 1."""
    shared = area(np.concatenate([np.maximum(one[:2], other[:2]), np.minimum(one[2:], other[2:])]))
    return shared / max(area(one) + area(other) - shared, 1e-9)


@dataclass(frozen=True)
class KeypointDetector:
    """The bundled extractor. It sees one head per look and its output has no score, so every find is looked at again.

    A face is believed when a second look, at a window around it, finds it at the same place. Without a face of the
    frame before, it looks at the largest squares of the picture and at nine smaller ones.
    """

    config: KeypointConfig
    network: KeypointExtractor

    def __call__(self, rgb: Pixels, last: Parts | None) -> list[Parts]:
        if last is not None:
            found = self._look(rgb, [around(last[0], rgb)])
            if found and overlap(found[0][0], last[0]) >= SAME_FACE:
                return found
        first = self._look(rgb, search_windows(rgb.shape[0], rgb.shape[1]))
        return [parts for guess in first for parts in self._again(rgb, guess)]

    def _again(self, rgb: Pixels, guess: Parts) -> list[Parts]:
        found = self._look(rgb, [around(guess[0], rgb)])
        return [parts for parts in found if overlap(parts[0], guess[0]) >= SAME_FACE]

    @torch.inference_mode()
    def _look(self, rgb: Pixels, windows: list[Window]) -> list[Parts]:
        side = self.config.image_px
        squares = np.stack(
            [cv2.resize(window.of(rgb), (side, side), interpolation=cv2.INTER_AREA) for window in windows]
        )
        pose = pose_from_raw(self.network(signed(squares.astype(np.uint8)) / 2 + 0.5))
        points = posed_keypoints(pose).numpy()[..., :2]
        looks = zip(points, pose.scale[:, 0], windows, strict=True)
        return [in_picture(parts_of_keypoints(p, s), window) for p, s, window in looks if is_head(p)]


def load_keypoints() -> Detector:
    """The bundled extractor as a detector; others order their keypoints in ways nobody has written down."""
    config, networks = load_networks("tiny", ["keypoint_extractor"])
    network = networks["keypoint_extractor"].float()
    assert isinstance(network, KeypointExtractor)
    return KeypointDetector(config.keypoints, network)


def is_head(points: Floats) -> bool:
    """Whether keypoints (K, 2), [-1, 1] across the window, can be a head: of some size, its middle in the window.

    Of a picture without a face the extractor's keypoints fall together outside of it.
    """
    low, high = points.min(0), points.max(0)
    share = float((high - low).max()) / 2
    centred = bool((np.abs(low + high) / 2 < 0.8).all())
    return centred and MIN_HEAD_SHARE <= share <= MAX_HEAD_SHARE


def parts_of_keypoints(points: Floats, scale: float) -> Parts:
    """Parts in [-1, 1] from the extractor's posed keypoints (K, 2).

    The head's box is that of drawn clips; eyes and mouth get more room, mostly above, where filmed people have them.
    """
    eye = np.array((0.24, 0.18), np.float32) * scale
    boxes = [
        hull(points, 0.14 * scale),
        hull(points[list(LEFT_EYE)], eye),
        hull(points[list(RIGHT_EYE)], eye),
        hull(points[list(MOUTH)], 0.12 * scale),
    ]
    # The keypoints are those of a closed mouth.
    boxes[3][3] += 0.1 * scale
    for box in boxes[1:]:
        box[1] -= 0.08 * scale
    return np.stack(boxes)


def hull(points: Floats, margin: Floats | float = 0.0) -> Floats:
    """The box (4,) around points (n, 2) with a margin on all sides."""
    return np.concatenate([points.min(0) - margin, points.max(0) + margin]).astype(np.float32)


def in_picture(parts: Parts, window: Window) -> Parts:
    """Parts in [-1, 1] of a window to pixels of the picture."""
    corner = np.array((window.x, window.y) * 2, np.float32)
    return np.asarray((parts + 1) / 2 * window.side + corner, np.float32)


def around(box: Floats, rgb: Pixels) -> Window:
    """The window in which a head (4,) has the size that the extractor knows, inside of the picture."""
    height, width = rgb.shape[:2]
    side = max(2, min(round(float(max(box[2] - box[0], box[3] - box[1])) / HEAD_SHARE), height, width))
    x, y = (round(float(box[axis] + box[axis + 2] - side) / 2) for axis in (0, 1))
    return Window(min(max(x, 0), width - side), min(max(y, 0), height - side), side)


def search_windows(height: int, width: int) -> list[Window]:
    """The largest squares of a picture (its middle, and both ends where it is long), then nine of 0.6 of that side."""
    side = min(height, width)
    shares = (0.0, 0.5, 1.0) if max(height, width) > 1.2 * side else (0.5,)
    small = max(2, round(0.6 * side))
    nine = [(x, y) for y in (0.0, 0.5, 1.0) for x in (0.0, 0.5, 1.0)]
    windows = [Window(round((width - side) * share), round((height - side) * share), side) for share in shares]
    return windows + [Window(round((width - small) * x), round((height - small) * y), small) for x, y in nine]


@dataclass(frozen=True)
class YuNetDetector:
    """OpenCV's YuNet: every face of a picture, wherever it is."""

    network: Any

    def __call__(self, rgb: Pixels, last: Parts | None) -> list[Parts]:
        shrink = min(1.0, YUNET_SIDE_PX / max(rgb.shape[:2]))
        size = (max(1, round(rgb.shape[1] * shrink)), max(1, round(rgb.shape[0] * shrink)))
        small = cv2.resize(rgb, size, interpolation=cv2.INTER_AREA)
        self.network.setInputSize(size)
        rows = self.network.detect(cv2.cvtColor(small, cv2.COLOR_RGB2BGR))[1]
        found = () if rows is None else np.asarray(rows, np.float32) / np.float32(shrink)
        return [parts_of_yunet(row) for row in found]


def load_yunet(path: str) -> Detector:
    """YuNet from an ONNX file such as `face_detection_yunet_2023mar.onnx`. Raises BadDetector."""
    _check_file(path, "a YuNet model of the OpenCV model zoo (an .onnx file)")
    try:
        limits = (YUNET_MIN_SCORE, YUNET_OVERLAP, YUNET_MAX_FACES)
        return YuNetDetector(cv2.FaceDetectorYN.create(path, "", (YUNET_SIDE_PX, YUNET_SIDE_PX), *limits))
    except (cv2.error, SystemError) as error:
        raise BadDetector(f"{path} is not a YuNet model that OpenCV can read ({error}): download it again") from None


def parts_of_yunet(row: Floats) -> Parts:
    """Parts from x, y, w, h and five points (left eye, right eye, nose, left and right mouth corner), row (15,).

    Five points know neither lids nor jaw: the boxes have sizes of a usual face. The unit is the larger of the distances
    from eye to eye and from eyes to mouth: when the head turns, only one of the two gets shorter.
    """
    x, y, width, height = row[:4]
    left_eye, right_eye, _, *corners = rearrange(row[4:14], "(n c) -> n c", c=2)
    mouth = np.mean(corners, axis=0)
    across, down = right_eye - left_eye, mouth - (left_eye + right_eye) / 2
    unit = float(max(np.linalg.norm(across), np.linalg.norm(down)))
    eye, lips = (np.array(share, np.float32) * np.float32(unit) for share in ((0.3, 0.2), (0.1, 0.25)))
    boxes = [
        with_crown(np.array((x, y, x + width, y + height), np.float32)),
        hull(left_eye[None], eye),
        hull(right_eye[None], eye),
        hull(np.stack(corners), lips),
    ]
    boxes[3][3] += 0.2 * unit
    return np.stack(boxes)


def with_crown(box: Floats) -> Floats:
    """A box (4,) from forehead to chin, grown to hold the crown."""
    grown = box.copy()
    grown[1] -= CROWN_SHARE * (box[3] - box[1])
    return grown


@dataclass(frozen=True)
class LandmarkDetector:
    """MediaPipe's FaceLandmarker."""

    mediapipe: Any
    network: Any

    def __call__(self, rgb: Pixels, last: Parts | None) -> list[Parts]:
        image = self.mediapipe.Image(image_format=self.mediapipe.ImageFormat.SRGB, data=np.ascontiguousarray(rgb))
        found = self.network.detect(image).face_landmarks
        size = np.array((rgb.shape[1], rgb.shape[0]), np.float32)
        return [parts_of_landmarks(np.array([(p.x, p.y) for p in face], np.float32) * size) for face in found]


def load_landmarks(path: str) -> Detector:
    """FaceLandmarker from a `.task` file. Raises BadDetector, also where `mediapipe` is not installed."""
    _check_file(path, "a FaceLandmarker model of MediaPipe (a .task file)")
    try:
        import mediapipe
        from mediapipe.tasks.python import BaseOptions, vision
    except ImportError:
        raise BadDetector("--landmarks needs MediaPipe: pip install mediapipe, or give --detector instead") from None
    options = vision.FaceLandmarkerOptions(
        base_options=BaseOptions(model_asset_path=path), num_faces=MAX_LANDMARK_FACES
    )
    try:
        return LandmarkDetector(mediapipe, vision.FaceLandmarker.create_from_options(options))
    except (RuntimeError, ValueError, OSError) as error:
        raise BadDetector(f"{path} is not a FaceLandmarker model ({error}): download it again") from None


def parts_of_landmarks(points: Floats) -> Parts:
    """Parts from the face mesh's landmarks (478, 2) in pixels; the eyes' landmarks are those of upstream's boxes."""
    parts = (LANDMARK_LEFT_EYE, LANDMARK_RIGHT_EYE, LANDMARK_LIPS)
    return np.stack([with_crown(hull(points)), *(hull(points[list(part)]) for part in parts)])


def _check_file(path: str, what: str) -> None:
    if not Path(path).is_file():
        raise BadDetector(f"{path} is not there: give the path of {what}")
