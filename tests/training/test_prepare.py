from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from training import prepare
from training.cutting import Reason, Rejected
from training.footage import Footage, Settings
from training.layout import BadData, Clip

SETTINGS = Settings(size_px=64)
FOOTAGE = Footage(
    50, (Clip("talk-000", 40, "talk.mp4 0.00 s"),), (Rejected(Reason.FACE_LOST, 40, 10),), ("truncated: somewhere",)
)


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    for name in ("talk.mp4", "sub/talk.MOV", "notes.txt", ".hidden.mp4"):
        (folder / name).write_text("not a video")
    return folder


def test_videos_are_found_in_folders_and_other_files_are_listed(videos: Path, tmp_path: Path) -> None:
    jobs, ignored = prepare.find_videos(videos, tmp_path / "out")
    assert [job.source for job in jobs] == ["sub/talk.MOV", "talk.mp4"]
    assert ignored == ["notes.txt"]
    assert len({job.name for job in jobs}) == 2 and all(job.name.startswith("talk-") for job in jobs)


def test_a_clip_is_called_the_same_in_every_run_whatever_else_is_in_the_folder(videos: Path, tmp_path: Path) -> None:
    before = {job.source: job.name for job in prepare.find_videos(videos, tmp_path / "out")[0]}
    (videos / "Ünlesbar . name.mkv").write_text("")
    after = {job.source: job.name for job in prepare.find_videos(videos, tmp_path / "out")[0]}
    assert before.items() <= after.items()
    assert all(name.isascii() and "/" not in name and " " not in name for name in after.values())


@pytest.mark.parametrize(
    ("folder", "out", "fix"),
    [("nowhere", "out", "is not a folder"), ("empty", "out", "holds no videos"), ("in", "in/out", "outside of it")],
)
def test_folders_that_cannot_be_used_say_so(videos: Path, tmp_path: Path, folder: str, out: str, fix: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadData, match=fix):
        prepare.find_videos(tmp_path / folder, tmp_path / out)


def test_a_folder_belongs_to_the_settings_it_was_filled_with(tmp_path: Path) -> None:
    prepare.claim(tmp_path, SETTINGS)
    prepare.claim(tmp_path, SETTINGS)
    with pytest.raises(BadData, match="other settings"):
        prepare.claim(tmp_path, Settings(size_px=96))


def test_what_is_done_is_known_until_the_video_changes(videos: Path, tmp_path: Path) -> None:
    prepare.claim(tmp_path, SETTINGS)
    job, other = prepare.find_videos(videos, tmp_path / "out")[0]
    assert prepare.read_done(tmp_path, job) is None
    prepare.write_done(tmp_path, job, FOOTAGE)
    assert prepare.read_done(tmp_path, job) == FOOTAGE
    assert prepare.read_done(tmp_path, other) is None
    os.utime(job.path, (1, 1))
    assert prepare.read_done(tmp_path, job) is None


def test_a_worker_answers_for_a_broken_video_and_goes_on(videos: Path, tmp_path: Path) -> None:
    prepare.claim(tmp_path, SETTINGS)
    worker = prepare.Worker(str(tmp_path), SETTINGS)
    for job in prepare.find_videos(videos, tmp_path / "out")[0]:
        assert worker(asdict(job))["error"] == ""
        done = prepare.read_done(tmp_path, job)
        assert done is not None and [row.reason for row in done.rejected] == [Reason.BAD_VIDEO]
    assert not list((tmp_path / "done").glob("*.tries"))


def test_a_video_that_kills_its_process_again_and_again_is_rejected(videos: Path, tmp_path: Path) -> None:
    prepare.claim(tmp_path, SETTINGS)
    job = prepare.find_videos(videos, tmp_path / "out")[0][0]
    (tmp_path / "done" / f"{job.name}.tries").write_text("3")
    prepare.Worker(str(tmp_path), SETTINGS)(asdict(job))
    done = prepare.read_done(tmp_path, job)
    assert done is not None and done.rejected[0].reason == Reason.CRASHED
    assert "delete" in done.rejected[0].detail


def test_the_report_counts_every_frame_and_names_every_reason(videos: Path, tmp_path: Path) -> None:
    first, second = prepare.find_videos(videos, tmp_path / "out")[0]
    bad = Footage(0, rejected=(Rejected(Reason.BAD_VIDEO, 0, 0, "no frame"),))
    made = prepare.report({first: FOOTAGE, second: bad}, ["notes.txt"], fps=25)
    counts = made["counts"]
    assert counts["used"] == {"stretches": 1, "frames": 40}
    assert counts["face_lost"] == {"stretches": 1, "frames": 10}
    assert sum(count["frames"] for count in counts.values()) == made["frames"] == 50
    assert [(row["source"], row["reason"], row["start_s"]) for row in made["rejected"]] == [
        (first.source, "face_lost", 1.6),
        (second.source, "bad_video", 0.0),
    ]
    assert made["notes"] == [{"source": first.source, "note": "truncated: somewhere"}]
    assert json.loads(json.dumps(made)) == made
    assert "face_lost                1        10" in prepare.table(made)


def test_a_run_in_which_everything_is_done_needs_no_ray_and_writes_the_manifest(videos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare.claim(out, SETTINGS)
    for job in prepare.find_videos(videos, out)[0]:
        prepare.write_done(out, job, FOOTAGE)
    made = prepare.prepare(videos, out, SETTINGS)
    assert made["counts"]["used"] == {"stretches": 2, "frames": 80}
    assert json.loads((out / "manifest.json").read_text())["size_px"] == 64
    assert json.loads((out / "rejected.json").read_text()) == made


def test_the_command_line_names_the_fix_and_its_code(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["prepare", str(videos), str(tmp_path / "out"), "--size", "100"])
    with pytest.raises(SystemExit, match="bad_config: --size must be"):
        prepare.main()
    monkeypatch.setattr(sys, "argv", ["prepare", str(videos), str(tmp_path / "out"), "--detector", "nowhere.onnx"])
    with pytest.raises(SystemExit, match=r"bad_detector: nowhere.onnx is not there"):
        prepare.main()
