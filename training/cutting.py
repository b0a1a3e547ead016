"""From what is seen in a video to clips: where to cut, and the one square crop of each. Called by `training.footage`.

Pure functions of numbers: faces are (n, 4, 4) as in `training.faces`, one row per frame at the constant rate, NaN where
there is none. Nothing is left out silently: every frame is in a clip or in a `Rejected` with its reason.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from stages.messages import Floats
from training.faces import Window, overlap

MAX_BRIDGE_FRAMES = 5
"""Faces that are lost for no longer are interpolated."""
JUMP = 1 / 3
"""Faces of two frames that overlap by less (intersection over union) are not one face that has moved."""
CROP_PER_HEAD = 1.4
"""The crop's side over the head's median size, crown to chin."""
CROP_PER_REACH = 1.05
"""The crop's side over what the heads of the clip cover together."""
RARE = 2.0
"""Percent of the clip's frames on either side that do not count in what its heads cover."""
MIN_INSIDE, MAX_OUTSIDE_FRAMES = 0.8, 0.05
"""A frame has left the crop with less of its head inside; a clip may have such a share of them."""
MIN_FRESH = 0.5
"""Share of frames that must differ from the one before: the rest were repeated to reach the constant rate."""


class Reason(StrEnum):
    """Why a stretch of a video, or all of it, is not used."""

    BAD_VIDEO = "bad_video"
    """No video, no frame, or too damaged to read any."""
    NO_FACE = "no_face"
    """Not one face in the whole video."""
    FACE_LOST = "face_lost"
    TOO_SHORT = "too_short"
    """Fewer frames between two cuts than a clip must have."""
    TOO_SMALL = "too_small"
    """The crop would have to be enlarged too much."""
    MOVES_TOO_FAR = "moves_too_far"
    """No still crop holds the head."""
    LOW_RATE = "low_rate"
    """Too few pictures a second."""
    CRASHED = "crashed"
    """The process that worked on it died, several times."""
    FAILED = "failed"
    """An unexpected error; the detail has it."""


@dataclass(frozen=True)
class Rejected:
    """Frames of a video that are not used."""

    reason: Reason
    start: int
    """First frame, at the constant rate."""
    num_frames: int
    detail: str = ""


@dataclass(frozen=True)
class Cut:
    """A clip to be written: frames `start` to `stop`, cropped to `crop`."""

    start: int
    stop: int
    crop: Window
    faces: Floats
    """(stop - start, 4, 4), bridged."""


@dataclass(frozen=True)
class Seen:
    """What one look through a video has found, per frame at the constant rate."""

    faces: Floats
    """(n, 4, 4); NaN where no face is."""
    begins: NDArray[np.bool_]
    """(n,) whether a new shot begins here."""
    fresh: NDArray[np.bool_]
    """(n,) whether the picture is another one than the frame before."""
    sizes: NDArray[np.int64]
    """(n, 2) height and width."""


@dataclass(frozen=True)
class Limits:
    """What a clip must be like."""

    min_frames: int = 32
    max_frames: int = 250
    min_crop_px: int = 256


def cut(seen: Seen, limits: Limits) -> tuple[list[Cut], list[Rejected]]:
    """The clips of a video, and everything else with its reason; both in the order of frames."""
    num_frames = len(seen.faces)
    faces = bridged(seen.faces, seen.begins)
    has_face = ~np.isnan(faces[:, 0, 0])
    if not has_face.any():
        return [], [Rejected(Reason.NO_FACE, 0, num_frames)] if num_frames else []
    found: list[Cut | Rejected] = []
    for stretch in stretches(has_face, seen.begins):
        if has_face[stretch.start]:
            found += [_judge(piece, faces, seen, limits) for piece in pieces(stretch, limits)]
        else:
            found.append(Rejected(Reason.FACE_LOST, stretch.start, len(stretch)))
    rejected = [part for part in found if isinstance(part, Rejected)]
    return [part for part in found if isinstance(part, Cut)], merged(rejected)


def merged(rejected: list[Rejected]) -> list[Rejected]:
    """Neighbours that are too short as one: a video of many holes or scenes is told of once."""
    result: list[Rejected] = []
    for row in rejected:
        last = result[-1] if result else None
        touches = last is not None and last.start + last.num_frames == row.start
        if last is not None and touches and last.reason == row.reason == Reason.TOO_SHORT:
            result[-1] = replace(last, num_frames=last.num_frames + row.num_frames)
        else:
            result.append(row)
    return result


def _judge(piece: range, faces: Floats, seen: Seen, limits: Limits) -> Cut | Rejected:
    inside = slice(piece.start, piece.stop)
    height, width = (int(side) for side in seen.sizes[piece.start])
    crop = crop_of(faces[inside, 0], height, width)
    outside = float((share_inside(faces[inside, 0], crop, height, width) < MIN_INSIDE).mean())
    fresh = float(seen.fresh[inside].mean())
    problems = {
        Reason.TOO_SHORT: (len(piece) < limits.min_frames, f"between cuts or holes: a clip needs {limits.min_frames}"),
        Reason.LOW_RATE: (fresh < MIN_FRESH, f"{fresh:.0%} of the frames are new pictures"),
        Reason.TOO_SMALL: (crop.side < limits.min_crop_px, f"crop of {crop.side} px, needs {limits.min_crop_px}"),
        Reason.MOVES_TOO_FAR: (
            outside > MAX_OUTSIDE_FRAMES,
            f"the head leaves the crop in {outside:.0%} of the frames",
        ),
    }
    for reason, (bad, detail) in problems.items():
        if bad:
            return Rejected(reason, piece.start, len(piece), detail)
    return Cut(piece.start, piece.stop, crop, faces[inside])


def bridged(faces: Floats, begins: NDArray[np.bool_]) -> Floats:
    """Short gaps between two faces of one shot, filled by interpolation."""
    filled = faces.copy()
    known = np.flatnonzero(~np.isnan(faces[:, 0, 0]))
    for before, after in pairwise(known):
        num_lost = after - before - 1
        same_shot = not begins[before + 1 : after + 1].any()
        if 0 < num_lost <= MAX_BRIDGE_FRAMES and same_shot and overlap(faces[before, 0], faces[after, 0]) >= JUMP:
            weight = (np.arange(1, num_lost + 1, dtype=np.float32) / np.float32(num_lost + 1))[:, None, None]
            filled[before + 1 : after] = (1 - weight) * faces[before] + weight * faces[after]
    return filled


def stretches(has_face: NDArray[np.bool_], begins: NDArray[np.bool_]) -> list[range]:
    """Frames in runs that have a face, or have none; those with a face lie in one shot each. They cover everything."""
    changes = has_face[1:] != has_face[:-1]
    edges = np.flatnonzero(changes | (begins[1:] & has_face[1:])) + 1
    bounds = [0, *edges.tolist(), len(has_face)]
    return [range(start, stop) for start, stop in pairwise(bounds)]


def pieces(stretch: range, limits: Limits) -> list[range]:
    """A stretch in equal parts (to one frame) of at most `max_frames`."""
    num_pieces = -(-len(stretch) // limits.max_frames)
    bounds = np.linspace(stretch.start, stretch.stop, num_pieces + 1).round().astype(int).tolist()
    return [range(start, stop) for start, stop in pairwise(bounds)]


def crop_of(heads: Floats, height: int, width: int) -> Window:
    """The one square of a clip with head boxes (n, 4), inside the picture.

    Its middle is the middle of what the heads cover; its side holds the median head with margin, or more where the head
    moves more, and is at most the picture's shorter side. It is never padded.
    """
    low = np.percentile(heads[:, :2], RARE, axis=0)
    high = np.percentile(heads[:, 2:], 100 - RARE, axis=0)
    size = float(np.median((heads[:, 2:] - heads[:, :2]).max(1)))
    wanted = max(CROP_PER_HEAD * size, CROP_PER_REACH * float((high - low).max()))
    side = max(2, min(round(wanted), height, width))
    x, y = (round(float(middle) - side / 2) for middle in (low + high) / 2)
    return Window(min(max(x, 0), width - side), min(max(y, 0), height - side), side)


def share_inside(heads: Floats, crop: Window, height: int, width: int) -> Floats:
    """(n,) how much of each head (n, 4), as far as it is in the picture, is inside the crop. 0 for none of it."""
    shown = np.clip(heads, 0, (width, height) * 2)
    kept = np.clip(shown, (crop.x, crop.y) * 2, (crop.x + crop.side, crop.y + crop.side) * 2)
    areas = [np.prod(np.maximum(boxes[:, 2:] - boxes[:, :2], 0), axis=1) for boxes in (kept, shown)]
    return np.asarray(areas[0] / np.maximum(areas[1], 1e-9), np.float32)


def boxes_in_crop(faces: Floats, crop: Window, size_px: int) -> NDArray[np.int32]:
    """Parts (n, 4, 4) of the video's pictures in pixels of the written clip, inside of it, int32."""
    moved = (faces - np.array((crop.x, crop.y) * 2, np.float32)) * np.float32(size_px / crop.side)
    return np.asarray(np.clip(np.round(moved), 0, size_px), np.int32)
