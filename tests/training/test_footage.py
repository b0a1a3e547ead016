from __future__ import annotations

from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest

from stages.errors import BadConfig
from stages.messages import Pixels
from stages.video import BadOutput, TimedFrame, read_video
from training.cutting import Limits, Reason
from training.faces import Detector, load_detector, overlap
from training.footage import Footage, Settings, at_rate, is_scene_change, prepare_video, thumbnail_of
from training.identity import sample_identity
from training.layout import read_boxes, video_path
from training.motion import sample_clip
from training.world import feature_boxes, render

SETTINGS = Settings(size_px=96, limits=Limits(min_frames=8, max_frames=24, min_crop_px=60))
HEIGHT, WIDTH = 243, 321


@pytest.fixture(scope="module")
def bundled() -> Detector:
    return load_detector()


@pytest.fixture(scope="module")
def talking() -> list[Pixels]:
    """30 frames (243, 321, 3) of a drawn person who sits left of the middle."""
    identity = sample_identity(5)
    motions = sample_clip(np.random.default_rng(5), 30)
    backdrop = np.full((HEIGHT, WIDTH, 3), (90, 120, 100), np.uint8)
    frames = []
    for motion in motions:
        frame = backdrop.copy()
        frame[:, :HEIGHT] = render(identity, motion, HEIGHT)
        frames.append(frame)
    return frames


def write(
    path: Path, frames: list[Pixels], times_s: list[float] | None = None, rotation: int = 0, fast: bool = False
) -> Path:
    """H.264 of frames at 25 a second or at their own times; `fast` has its header in front."""
    times_s = times_s or [index / 25 for index in range(len(frames))]
    with av.open(str(path), "w", options={"movflags": "faststart"} if fast else {}) as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "12", "preset": "ultrafast"})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv444p"
        stream.codec_context.time_base = Fraction(1, 1000)
        stream.set_display_rotation(rotation)
        for frame, time_s in zip(frames, times_s, strict=True):
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            picture.pts, picture.time_base = round(time_s * 1000), Fraction(1, 1000)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return path


def prepared(path: Path, folder: Path, detector: Detector, settings: Settings = SETTINGS) -> Footage:
    footage = prepare_video(path, path.name, "talk", folder, settings, detector)
    rejected = sum(row.num_frames for row in footage.rejected)
    assert footage.num_frames == sum(clip.num_frames for clip in footage.clips) + rejected
    for clip in footage.clips:
        boxes = read_boxes(folder, clip.name)
        shown = [frame.rgb for frame in read_video(video_path(folder, clip.name))]
        assert len(shown) == len(boxes.face) == clip.num_frames
        assert {frame.shape for frame in shown} == {(settings.size_px, settings.size_px, 3)}
        assert ((boxes.face >= 0) & (boxes.face <= settings.size_px)).all()
    return footage


def test_an_odd_sized_video_becomes_square_clips_with_boxes(
    tmp_path: Path, bundled: Detector, talking: list[Pixels]
) -> None:
    footage = prepared(write(tmp_path / "a.mp4", talking), tmp_path, bundled)
    assert [clip.num_frames for clip in footage.clips] == [15, 15]
    assert [clip.name for clip in footage.clips] == ["talk-000", "talk-001"]
    assert [clip.source for clip in footage.clips] == ["a.mp4 0.00 s", "a.mp4 0.60 s"]
    assert (footage.rejected, footage.notes) == ((), ())


def test_the_boxes_lie_on_the_person(tmp_path: Path, bundled: Detector) -> None:
    identity, motions = sample_identity(6), sample_clip(np.random.default_rng(6), 9)
    path = write(tmp_path / "a.mp4", [render(identity, motion, 192) for motion in motions])
    prepared(path, tmp_path, bundled, Settings(192, limits=Limits(8, 24, 60)))
    # The crop is nearly the whole picture, so that its boxes can be compared with the picture's.
    found = read_boxes(tmp_path, "talk-000").face
    true = np.stack([feature_boxes(identity, motion, 192)["face"] for motion in motions])
    assert (
        np.mean([overlap(f.astype(np.float32), t.astype(np.float32)) for f, t in zip(found, true, strict=True)]) > 0.5
    )


def test_a_truncated_video_gives_the_frames_before_the_break(
    tmp_path: Path, bundled: Detector, talking: list[Pixels]
) -> None:
    whole = write(tmp_path / "a.mp4", talking, fast=True).read_bytes()
    (tmp_path / "b.mp4").write_bytes(whole[: len(whole) * 2 // 3])
    footage = prepared(tmp_path / "b.mp4", tmp_path, bundled)
    assert 8 <= footage.num_frames < 30 and footage.clips
    assert footage.notes[0].startswith(f"truncated: breaks off after {footage.num_frames} frames")


@pytest.mark.parametrize("content", ["", "text", "headless"])
def test_what_is_not_a_video_is_rejected_with_the_reason(
    tmp_path: Path, bundled: Detector, talking: list[Pixels], content: str
) -> None:
    headless = write(tmp_path / "a.mp4", talking[:9]).read_bytes()[:2000]
    (tmp_path / "b.mp4").write_bytes({"": b"", "text": b"not a video", "headless": headless}[content])
    footage = prepared(tmp_path / "b.mp4", tmp_path, bundled)
    assert [row.reason for row in footage.rejected] == [Reason.BAD_VIDEO]
    assert "b.mp4" in footage.rejected[0].detail


def test_a_video_without_frames_is_rejected(tmp_path: Path, bundled: Detector) -> None:
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = 64, 64, "yuv420p"
        container.mux(stream.encode())
    assert [row.reason for row in prepared(path, tmp_path, bundled).rejected] == [Reason.BAD_VIDEO]


def test_a_video_without_a_face_is_rejected_whole(tmp_path: Path, bundled: Detector) -> None:
    path = write(tmp_path / "a.mp4", [np.full((90, 120, 3), 100 + k, np.uint8) for k in range(12)])
    footage = prepared(path, tmp_path, bundled)
    assert [(row.reason, row.num_frames) for row in footage.rejected] == [(Reason.NO_FACE, 12)]


def test_a_video_too_short_for_a_clip_is_rejected(tmp_path: Path, bundled: Detector, talking: list[Pixels]) -> None:
    footage = prepared(write(tmp_path / "a.mp4", talking[:5]), tmp_path, bundled)
    assert [row.reason for row in footage.rejected] == [Reason.TOO_SHORT]


def test_a_turned_video_is_set_upright_before_faces_are_sought(
    tmp_path: Path, bundled: Detector, talking: list[Pixels]
) -> None:
    lying = [np.rot90(frame, -1) for frame in talking[:10]]
    footage = prepared(write(tmp_path / "a.mp4", lying, rotation=90), tmp_path, bundled)
    assert [clip.num_frames for clip in footage.clips] == [10]


def test_a_scene_change_is_a_cut(tmp_path: Path, bundled: Detector, talking: list[Pixels]) -> None:
    other = [np.ascontiguousarray(255 - frame[:, ::-1]) for frame in talking[:3]]
    footage = prepared(write(tmp_path / "a.mp4", talking[:12] + other + talking[12:24]), tmp_path, bundled)
    assert [clip.num_frames for clip in footage.clips] == [12, 12]


def test_a_second_try_leaves_no_clips_of_the_first(tmp_path: Path, bundled: Detector, talking: list[Pixels]) -> None:
    prepared(write(tmp_path / "a.mp4", talking), tmp_path, bundled)
    (tmp_path / "videos" / ".talk-007.mp4").write_text("half a clip")
    prepared(write(tmp_path / "a.mp4", talking[:12]), tmp_path, bundled)
    assert sorted(path.name for path in (tmp_path / "videos").iterdir()) == ["talk-000.mp4"]
    assert sorted(path.name for path in (tmp_path / "boxes").iterdir()) == ["talk-000.npz"]


def test_a_folder_that_takes_nothing_ends_the_run(tmp_path: Path, bundled: Detector, talking: list[Pixels]) -> None:
    (tmp_path / "videos").write_text("in the way")
    with pytest.raises(BadOutput, match="cannot be written"):
        prepared(write(tmp_path / "a.mp4", talking[:10]), tmp_path, bundled)


def shown(times_s: list[float], fps: int = 25) -> list[tuple[int, bool, bool]]:
    """Which of the frames at these times is shown at each tick, whether it is fresh, and whether after a hole."""
    frames = [TimedFrame(np.full((1, 1, 3), index, np.uint8), time_s) for index, time_s in enumerate(times_s)]
    return [(int(tick.rgb[0, 0, 0]), tick.fresh, tick.after_hole) for tick in at_rate(frames, fps)]


def numbers(times_s: list[float]) -> list[int]:
    return [number for number, _, _ in shown(times_s)]


def test_a_video_of_the_right_rate_is_left_alone_even_if_its_clock_trembles() -> None:
    trembling = [7.0 + index / 25 + 0.004 * (-1) ** index for index in range(50)]
    assert numbers([index / 25 for index in range(50)]) == list(range(50))
    assert numbers(trembling) == list(range(50))


@pytest.mark.parametrize(("rate", "num_frames"), [(50, 100), (30, 60), (12.5, 25), (23.976, 48)])
def test_other_rates_keep_their_duration(rate: float, num_frames: int) -> None:
    assert len(numbers([index / rate for index in range(num_frames)])) == pytest.approx(50, abs=1)


def test_pictures_are_repeated_where_they_come_late_and_known_as_repeated() -> None:
    assert shown([0.0, 0.04, 0.12, 0.16]) == [
        (0, True, False),
        (1, True, False),
        (1, False, False),
        (2, True, False),
        (3, True, False),
    ]


def test_over_a_hole_the_clock_starts_anew_however_long_it_is() -> None:
    assert shown([0.0, 0.04, 1e6, 1e6 + 0.04]) == [
        (0, True, False),
        (1, True, False),
        (2, True, True),
        (3, True, False),
    ]


def test_no_frames_are_no_ticks() -> None:
    assert shown([]) == []


def test_neighbours_of_a_talk_are_one_scene_and_others_are_not(talking: list[Pixels]) -> None:
    small = [thumbnail_of(frame) for frame in talking]
    assert not any(is_scene_change(a, b) for a, b in pairwise(small))
    assert is_scene_change(small[0], 255 - small[0])


@pytest.mark.parametrize(
    ("changes", "fix"),
    [
        ({"size_px": 100}, "--size"),
        ({"fps": 0}, "--fps"),
        ({"limits": Limits(min_frames=1)}, "--min-frames"),
        ({"limits": Limits(min_frames=32, max_frames=50)}, "--max-frames"),
    ],
)
def test_impossible_settings_name_the_option(changes: dict, fix: str) -> None:
    with pytest.raises(BadConfig, match=fix):
        Settings(**changes)
