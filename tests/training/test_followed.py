"""Following: labels are checked, frames meet their answers, and the bundled clip goes through the whole command."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stages.pipeline import Stages, load_stages
from stages.portraits import BUNDLED_CLIP, load_portrait, read_portrait
from stages.video import TimedFrame, read_video, square_resize
from training.assets import driving_motions
from training.followed import Labels, answered, correlations, main, read_labels, table

FRAMES = [1, 4, 6, 7]


@pytest.fixture(scope="module")
def stages() -> Stages:
    return load_stages("tiny", device="cpu", num_threads=1)


def true_labels(frames: list[int]) -> dict[str, list[float]]:
    motions = [driving_motions()[frame] for frame in frames]
    return {
        "frames": list(frames),
        "yaw": [motion.yaw for motion in motions],
        "mouth": [motion.jaw for motion in motions],
        "blink": [motion.blink_left for motion in motions],
    }


def written(folder: Path, labels: Any) -> Path:
    path = folder / "labels.json"
    path.write_text(json.dumps(labels))
    return path


def command(labels: Path, *more: str, driving: Path = BUNDLED_CLIP) -> int:
    fixed = ["--device", "cpu", "--threads", "1", "--portrait", "ben", "--driving", str(driving)]
    return main([*fixed, "--labels", str(labels), *more])


def test_the_command_follows_the_bundled_clip_and_shows_both_sides(tmp_path: Path, capsys):
    out = tmp_path / "new" / "folder"
    assert command(written(tmp_path, true_labels(FRAMES)), "--json", "--out", str(out)) == 0
    report = json.loads(capsys.readouterr().out)
    found = report["correlation"]
    assert {reader: set(series) for reader, series in found.items()} == {
        "output": {"yaw", "mouth", "blink"}, "keypoint_extractor": {"yaw"}, "motion_encoder": {"mouth", "blink"},
    }  # fmt: skip
    assert all(-1 <= r <= 1 for series in found.values() for r in series.values())
    assert (report["num_frames"], report["num_no_face"]) == (len(FRAMES), 0)
    assert "keypoint extractor" in table(report)
    series = json.loads((out / "followed.json").read_text())["series"]
    assert np.shape(series["output"]["yaw"]) == (len(FRAMES),)
    frames = [frame.rgb for frame in read_video(out / "followed.mp4")]
    assert len(frames) == FRAMES[-1] + 1 and frames[0].shape[1] == 2 * frames[0].shape[0]


def test_every_driving_frame_meets_its_own_answer(stages: Stages):
    driving = list(islice(read_video(BUNDLED_CLIP), 6))
    size = stages.config.size_px
    portrait = load_portrait(read_portrait("ben"), size)
    pairs = list(answered(stages, portrait, driving, 0))
    assert [(asked.time_s, shown.time_s) for asked, shown in pairs] == [(frame.time_s,) * 2 for frame in driving]
    assert all(
        np.array_equal(asked.rgb, square_resize(f.rgb, size)) for (asked, _), f in zip(pairs, driving, strict=True)
    )
    assert all(isinstance(shown, TimedFrame) and shown.rgb.shape == (size, size, 3) for _, shown in pairs)


def test_a_reader_that_says_the_labels_correlates_and_one_that_stands_still_does_not():
    yaw = np.array([1.0, -4, 2], np.float32)
    labels = Labels((0, 3, 5), {"yaw": yaw, "mouth": np.zeros(3, np.float32), "blink": np.zeros(3, np.float32)})
    found = correlations(labels, {"output": {"yaw": 2 * yaw + 1, "mouth": yaw}, "keypoint_extractor": {"yaw": -yaw}})
    assert found["output"] == {"yaw": pytest.approx(1), "mouth": 0}
    assert found["keypoint_extractor"]["yaw"] == pytest.approx(-1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"yaw": [0.0, 1.0]}, "unequal lengths"),
        ({"mouth": [0, 0, 0, float("nan")]}, "finite"),
        ({"mouth": ["wide", 0, 0, 0]}, "all of numbers"),
        ({"frames": [1, 4, 4, 7]}, "increasing"),
        ({"frames": [-1, 4, 6, 7]}, "counted from 0"),
        ({"frames": [1, 4, 6, 7000]}, "has 300 frames"),
        ({"frames": [1, 4, 6, 7.5]}, "all of numbers"),
        ({"frames": None}, "JSON object"),
    ],
)
def test_labels_that_cannot_belong_to_the_video_are_refused_with_a_sentence(change, said, tmp_path: Path, capsys):
    assert command(written(tmp_path, true_labels(FRAMES) | change)) == 2
    error = capsys.readouterr().err
    assert "bad_labels" in error and said in error


def test_a_missing_file_of_labels_is_named(tmp_path: Path, capsys):
    assert command(tmp_path / "none.json") == 2
    assert "none.json cannot be read" in capsys.readouterr().err


def test_labels_are_read_as_they_were_written(tmp_path: Path):
    labels = read_labels(written(tmp_path, true_labels(FRAMES)))
    assert labels.frames == tuple(FRAMES)
    assert labels.movements["yaw"].tolist() == pytest.approx(true_labels(FRAMES)["yaw"])
