"""One filmed video to clips of the training layout: look for the face, decide where to cut, write. No Ray.

Called by `training.prepare` for every video. The video is read twice, so that its length costs no memory: once to look,
once to write what `training.cutting` has decided.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import av
import cv2
import numpy as np

from stages.errors import BadConfig, BadVideo
from stages.messages import Floats, Pixels
from stages.video import BadOutput, TimedFrame, read_video, square_resize
from training.cutting import JUMP, Cut, Limits, Reason, Rejected, Seen, boxes_in_crop, cut
from training.faces import PARTS, Detector, choose, overlap
from training.layout import Boxes, Clip, video_path, write_boxes
from training.world import write_clip

MAX_HOLE_S = 0.2
"""A longer hole in the timestamps is a cut: the picture would stand still in it."""
EARLY = 0.25
"""Share of a frame's time by which a picture may come after the moment at which it is shown."""
SEARCH_EVERY = 5
"""Without a face in the frame before, only every so many frames are searched."""
THUMBNAIL_PX = 32
SCENE_CHANGE = 24.0
"""Grey levels by which thumbnails of two frames differ on average when the scene is another. A lively talking head
reaches 8. Dissolves and cuts to a similar picture are not noticed this way, the latter by the jump of the face."""
QUALITY, KEYFRAME_EVERY = 16, 12


@dataclass(frozen=True)
class Settings:
    """What clips are to be like. Raises BadConfig."""

    size_px: int = 512
    fps: int = 25
    limits: Limits = field(default_factory=Limits)
    yunet: str = ""
    """Paths of detectors' models; the bundled one without."""
    landmarks: str = ""

    def __post_init__(self) -> None:
        limits = self.limits
        problems = {
            "--size must be a multiple of 16, at least 32": self.size_px % 16 or self.size_px < 32,
            "--fps must be from 1 to 120": not 1 <= self.fps <= 120,
            "--min-frames must be at least 2": limits.min_frames < 2,
            "--max-frames must be at least twice --min-frames": limits.max_frames < 2 * limits.min_frames,
            "--min-crop must be at least 2": limits.min_crop_px < 2,
        }
        for message, bad in problems.items():
            if bad:
                raise BadConfig(message)


@dataclass(frozen=True)
class Footage:
    """What has become of one video. Its clips and rejected stretches have `num_frames` frames together."""

    num_frames: int
    """At the constant rate."""
    clips: tuple[Clip, ...] = ()
    rejected: tuple[Rejected, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Tick:
    """What is shown at one moment of the constant rate."""

    rgb: Pixels
    fresh: bool
    """Whether it is another picture than the tick before."""
    after_hole: bool
    """Whether the clock was started anew."""


def prepare_video(path: Path, source: str, name: str, folder: Path, settings: Settings, detector: Detector) -> Footage:
    """Writes the clips of one video, `name`-000 and so on, into the data folder `folder`.

    A video that cannot be used is an answer, not an error. Raises BadOutput where the folder takes no more.
    """
    for stale in (*(folder / "videos").glob(f"*{name}-*.mp4"), *(folder / "boxes").glob(f"{name}-*.npz")):
        stale.unlink()
    notes: list[str] = []
    try:
        seen = look(path, settings, detector, notes)
    except BadVideo as error:
        return Footage(0, rejected=(Rejected(Reason.BAD_VIDEO, 0, 0, str(error)),))
    cuts, rejected = cut(seen, settings.limits)
    clips = write_cuts(path, source, name, folder, settings, cuts)
    return Footage(len(seen.faces), tuple(clips), tuple(rejected), tuple(notes))


def look(path: Path, settings: Settings, detector: Detector, notes: list[str]) -> Seen:
    """Follows one face through a video; what is odd about the file is added to `notes`. Raises BadVideo."""
    faces: list[Floats] = []
    begins: list[bool] = []
    fresh: list[bool] = []
    sizes: list[tuple[int, ...]] = []
    last: Floats | None = None
    thumbnail: Pixels | None = None
    for index, tick in enumerate(ticks(path, settings.fps, notes)):
        before, thumbnail = thumbnail, thumbnail_of(tick.rgb)
        new_size = bool(sizes) and sizes[-1] != tick.rgb.shape[:2]
        new_shot = before is None or tick.after_hole or new_size or is_scene_change(before, thumbnail)
        last, followed = (None if new_shot else last), last
        is_searched = last is not None or new_shot or index % SEARCH_EVERY == 0
        face = choose(detector(tick.rgb, last), last) if is_searched else None
        jumps = face is not None and followed is not None and overlap(face[0], followed[0]) < JUMP
        faces.append(np.full((len(PARTS), 4), np.nan, np.float32) if face is None else face)
        begins.append(new_shot or jumps)
        fresh.append(tick.fresh)
        sizes.append(tick.rgb.shape[:2])
        last = face
    num = len(faces)
    shape = (num, len(PARTS), 4)
    return Seen(np.array(faces, np.float32).reshape(shape), np.array(begins), np.array(fresh), np.array(sizes))


def write_cuts(path: Path, source: str, name: str, folder: Path, settings: Settings, cuts: list[Cut]) -> list[Clip]:
    """Reads the video again and writes its clips and their boxes. Raises BadOutput."""
    clips: list[Clip] = []
    frames: list[Pixels] = []
    waiting = iter(cuts)
    current = next(waiting, None)
    for index, tick in enumerate(ticks(path, settings.fps, [])):
        if current is None:
            break
        if index >= current.start:
            frames.append(square_resize(current.crop.of(tick.rgb), settings.size_px))
        if index == current.stop - 1:
            clip = Clip(f"{name}-{len(clips):03d}", len(frames), f"{source} {current.start / settings.fps:.2f} s")
            _write(folder, clip, frames, current, settings)
            clips.append(clip)
            frames, current = [], next(waiting, None)
    return clips


def _write(folder: Path, clip: Clip, frames: list[Pixels], made: Cut, settings: Settings) -> None:
    target = video_path(folder, clip.name)
    partial = target.with_name(f".{clip.name}.mp4")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_clip(partial, frames, settings.fps, QUALITY, "yuv420p", KEYFRAME_EVERY, "veryfast")
        parts = boxes_in_crop(made.faces, made.crop, settings.size_px)
        write_boxes(folder, clip.name, Boxes(**{part: parts[:, row] for row, part in enumerate(PARTS)}))
        partial.replace(target)
    except (av.FFmpegError, OSError) as error:
        raise BadOutput(
            f"{target} cannot be written ({error.strerror or error}): make room, then start again"
        ) from None


def ticks(path: Path, fps: int, notes: list[str]) -> Iterator[Tick]:
    """A video at a constant rate, as far as it can be read. Raises BadVideo where that is not one frame."""
    return at_rate(readable_frames(path, notes), fps)


def readable_frames(path: Path, notes: list[str]) -> Iterator[TimedFrame]:
    """The frames before a video breaks off; notes that it does. Raises BadVideo where there is none."""
    num_frames = 0
    try:
        for frame in read_video(path):
            num_frames += 1
            yield frame
    except BadVideo as error:
        if not num_frames:
            raise
        notes.append(f"truncated: breaks off after {num_frames} frames, which are used ({error})")


def at_rate(frames: Iterable[TimedFrame], fps: float) -> Iterator[Tick]:
    """Frames with times of their own to `fps` frames a second: at each moment what is shown then.

    Pictures are repeated or left out, never blended. Over a hole longer than MAX_HOLE_S the clock is started anew.
    """
    held: TimedFrame | None = None
    start_s, num_ticks, shown, after_hole = 0.0, 0, False, False
    early_s = EARLY / fps
    for frame in frames:
        is_hole = held is not None and frame.time_s - held.time_s > MAX_HOLE_S
        while held is not None:
            # Before a hole the last picture is not held until the hole's end.
            until_s = held.time_s + early_s if is_hole else frame.time_s - early_s
            if start_s + num_ticks / fps >= until_s:
                break
            yield Tick(held.rgb, not shown, after_hole and num_ticks == 0)
            num_ticks, shown = num_ticks + 1, True
        if held is None or is_hole:
            start_s, num_ticks, after_hole = frame.time_s, 0, is_hole
        held, shown = frame, False
    if held is not None and start_s + num_ticks / fps <= held.time_s + early_s:
        yield Tick(held.rgb, not shown, after_hole and num_ticks == 0)


def thumbnail_of(rgb: Pixels) -> Pixels:
    """A picture in small, for `is_scene_change`."""
    return np.asarray(cv2.resize(rgb, (THUMBNAIL_PX, THUMBNAIL_PX), interpolation=cv2.INTER_AREA), np.uint8)


def is_scene_change(before: Pixels, after: Pixels) -> bool:
    """Whether two thumbnails differ more than one shot's neighbours do."""
    return float(np.abs(before.astype(np.int16) - after).mean()) > SCENE_CHANGE
