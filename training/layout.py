"""The layout that training data has on disk, whether drawn or filmed: `training.draw` and `training.prepare` write it.

    DATA/manifest.json        {"size_px", "fps", "clips": [{"name", "num_frames", "source"}, ...]}
    DATA/videos/NAME.mp4      square, of constant frame rate
    DATA/boxes/NAME.npz       face, left_eye, right_eye, mouth: (num_frames, 4) int32 x1, y1, x2, y2 (exclusive)
    DATA/truth/NAME.npz       drawn clips only: motions (num_frames, 14), canonical (K, 3), person (their seed)

*Left* and *right* are those of the picture.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stages.errors import UserError
from stages.messages import Floats

MANIFEST = "manifest.json"


class BadData(UserError):
    """A data folder or a clip that cannot be used."""

    code = "bad_data"


@dataclass(frozen=True)
class Clip:
    """One video of a data folder."""

    name: str
    num_frames: int
    source: str = ""
    """Where it is from: a file, or a person of the world."""


@dataclass(frozen=True)
class Manifest:
    """A data folder."""

    folder: Path
    size_px: int
    fps: float
    clips: tuple[Clip, ...]


@dataclass(frozen=True)
class Boxes:
    """Where the face and its parts are, per frame."""

    face: NDArray[np.int32]
    left_eye: NDArray[np.int32]
    right_eye: NDArray[np.int32]
    mouth: NDArray[np.int32]


@dataclass(frozen=True)
class Truth:
    """What the world knows of a drawn clip."""

    motions: Floats
    """(n, 14) in the order of `training.motion.Motion`."""
    canonical: Floats
    """(K, 3)."""
    person: int = -1
    """Whose seed `training.identity.sample_identity` takes; -1: not known."""


def video_path(folder: Path, name: str) -> Path:
    return folder / "videos" / f"{name}.mp4"


def boxes_path(folder: Path, name: str) -> Path:
    return folder / "boxes" / f"{name}.npz"


def truth_path(folder: Path, name: str) -> Path:
    return folder / "truth" / f"{name}.npz"


def write_manifest(manifest: Manifest) -> Path:
    """Writes the folder's manifest in one move; clips in the order of their names, which is the order of training."""
    clips = [asdict(clip) for clip in sorted(manifest.clips, key=lambda clip: clip.name)]
    path = manifest.folder / MANIFEST
    _replace(path, json.dumps({"size_px": manifest.size_px, "fps": manifest.fps, "clips": clips}, indent=1))
    return path


def read_manifest(folder: Path) -> Manifest:
    """Reads a data folder's manifest. Raises BadData, naming the command that writes one."""
    path = folder / MANIFEST
    if not path.exists():
        raise BadData(
            f"{path} is missing: fill the folder by `python -m training.draw` or `python -m training.prepare`"
        )
    try:
        values = json.loads(path.read_text())
        clips = tuple(Clip(**clip) for clip in values["clips"])
        manifest = Manifest(folder, int(values["size_px"]), float(values["fps"]), clips)
    except (ValueError, KeyError, TypeError) as error:
        raise BadData(f"{path} is not a manifest: {error}") from error
    if not manifest.clips:
        raise BadData(f"{path} lists no clips")
    return manifest


def manifest_digest(manifest: Manifest) -> str:
    """Names what a manifest lists, wherever its folder lies."""
    listed = [manifest.size_px, manifest.fps, [asdict(clip) for clip in manifest.clips]]
    return hashlib.blake2b(json.dumps(listed).encode(), digest_size=16).hexdigest()


def claim_folder(folder: Path, name: str, settings: Mapping[str, Any]) -> None:
    """Notes in `folder`/`name` with which settings the folder is filled. Raises BadData where it has been with others.

    A folder that was filled before such notes were made is taken as it is.
    """
    path, wanted = folder / name, json.dumps(dict(settings), indent=1)
    folder.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        _replace(path, wanted)
    elif path.read_text() != wanted:
        raise BadData(f"{folder} was filled with other settings ({path}): repeat those, or choose another folder")


def _replace(path: Path, text: str) -> None:
    partial = path.with_suffix(".part")
    partial.write_text(text)
    partial.replace(path)


def write_boxes(folder: Path, name: str, boxes: Boxes) -> None:
    """Saves the boxes of a clip."""
    path = boxes_path(folder, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **asdict(boxes))


def read_boxes(folder: Path, name: str) -> Boxes:
    """The boxes of a clip. Raises BadData where they are missing or not as the layout says."""
    path = boxes_path(folder, name)
    try:
        with np.load(path, allow_pickle=False) as stored:
            parts = [np.asarray(stored[field.name], np.int32) for field in fields(Boxes)]
    except (OSError, ValueError, KeyError) as error:
        raise BadData(f"{path} does not hold a clip's boxes: {error}") from error
    if {part.shape for part in parts} != {(len(parts[0]), 4)}:
        raise BadData(f"{path}: boxes must be (frames, 4) and as many of each kind")
    return Boxes(*parts)


def write_truth(folder: Path, name: str, truth: Truth) -> None:
    """Saves what is true of a drawn clip."""
    path = truth_path(folder, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    # In one move: a clip whose truth is there is drawn.
    partial = path.with_suffix(".part.npz")
    np.savez(partial, motions=truth.motions, canonical=truth.canonical, person=truth.person)
    partial.replace(path)


def read_truth(folder: Path, name: str) -> Truth | None:
    """What is true of a drawn clip; None of a filmed one."""
    path = truth_path(folder, name)
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as stored:
            motions, canonical = (np.asarray(stored[name], np.float32) for name in ("motions", "canonical"))
            return Truth(motions, canonical, int(stored["person"]) if "person" in stored else -1)
    except (OSError, ValueError, KeyError) as error:
        raise BadData(f"{path} does not hold a drawn clip's truth: {error}") from error
