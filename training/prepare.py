"""Turns a folder of videos into training data, as a Ray Data job: `python -m training.prepare VIDEOS OUT`.

One task per video (`training.footage`), on all nodes of a cluster or in processes of this machine; OUT must be seen by
all of them. OUT gets the layout of `training.layout`, and rejected.json with what is not used and why. A second run
does only what is not done yet: every finished video has an answer in OUT/done. docs/training.md says how to use it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import torch
from tqdm import tqdm

from stages.errors import UserError
from training.cutting import Limits, Reason, Rejected
from training.faces import load_detector
from training.footage import Footage, Settings, prepare_video
from training.layout import BadData, Clip, Manifest, claim_folder, write_manifest

ENDINGS = (".3gp", ".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ts", ".webm", ".wmv")
MAX_TRIES = 3
"""So often a video is tried whose process dies; then it is rejected as `crashed`."""
BLOCKS_PER_WORKER = 50


@dataclass(frozen=True)
class Job:
    """One video to prepare."""

    path: str
    source: str
    """Relative to the folder of videos: what reports call it."""
    name: str
    """What its clips' names begin with; unique in the folder."""

    @property
    def fingerprint(self) -> str:
        """Changes when the file does."""
        if not os.path.exists(self.path):
            return "gone"
        status = os.stat(self.path)
        return f"{status.st_size} {status.st_mtime_ns}"


def find_videos(videos: Path, folder: Path) -> tuple[list[Job], list[str]]:
    """All videos below a folder, in the order of their names, and the other files. Raises BadData."""
    if not videos.is_dir():
        raise BadData(f"{videos} is not a folder: give the folder that holds the videos")
    if folder.resolve().is_relative_to(videos.resolve()):
        raise BadData(f"{folder} lies in {videos}, which is read: choose a folder outside of it")
    files = sorted(path for path in videos.rglob("*") if path.is_file() and not path.name.startswith("."))
    jobs = [_job(path, videos) for path in files if path.suffix.lower() in ENDINGS]
    if not jobs:
        raise BadData(f"{videos} holds no videos: their names end in {', '.join(ENDINGS)}")
    return jobs, [str(path.relative_to(videos)) for path in files if path.suffix.lower() not in ENDINGS]


def _job(path: Path, videos: Path) -> Job:
    source = path.relative_to(videos).as_posix()
    readable = re.sub(r"[^A-Za-z0-9]+", "-", path.stem).strip("-")[:40] or "video"
    return Job(str(path.resolve()), source, f"{readable}-{hashlib.sha256(source.encode()).hexdigest()[:8]}")


def claim(folder: Path, settings: Settings) -> None:
    """Makes a folder one of these settings. Raises BadData where it has been filled with others."""
    claim_folder(folder, "prepare.json", asdict(settings))
    (folder / "done").mkdir(exist_ok=True)


def read_done(folder: Path, job: Job) -> Footage | None:
    """What an earlier run has made of a video; None where there is none, or where the video has changed since."""
    try:
        values = json.loads(_done_path(folder, job).read_text())
        if values["fingerprint"] != job.fingerprint:
            return None
        clips = tuple(Clip(**clip) for clip in values["clips"])
        rejected = tuple(Rejected(**row | {"reason": Reason(row["reason"])}) for row in values["rejected"])
        return Footage(values["num_frames"], clips, rejected, tuple(values["notes"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_done(folder: Path, job: Job, footage: Footage) -> None:
    """Notes that a video is done, after everything else of it has been written."""
    values = {"source": job.source, "fingerprint": job.fingerprint} | asdict(footage)
    _replace(_done_path(folder, job), json.dumps(values, indent=1))


def _done_path(folder: Path, job: Job) -> Path:
    return folder / "done" / f"{job.name}.json"


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.part")
    partial.write_text(text)
    partial.replace(path)


class Worker:
    """A process that prepares videos, one after another. Made by Ray Data; rows are jobs in, empty or an error out."""

    def __init__(self, folder: str, settings: Settings):
        # One thread each: there are as many workers as processors.
        cv2.setNumThreads(1)
        torch.set_num_threads(1)
        self._folder, self._settings = Path(folder), settings
        self._detector = load_detector(settings.yunet, settings.landmarks)

    def __call__(self, row: dict[str, str]) -> dict[str, str]:
        job = Job(**row)
        try:
            write_done(self._folder, job, self._prepare(job))
        except (UserError, OSError) as error:
            # Not the video's fault, such as a full disk: the whole run ends with it.
            return row | {"error": str(error)}
        return row | {"error": ""}

    def _prepare(self, job: Job) -> Footage:
        """The video's clips. An unexpected error rejects the video; so does the death of the process, in the end."""
        tries = self._folder / "done" / f"{job.name}.tries"
        num_tries = int(tries.read_text() or 0) if tries.exists() else 0
        if num_tries >= MAX_TRIES:
            return _rejected(Reason.CRASHED, f"its process died {num_tries} times: delete {tries} to try it again")
        _replace(tries, str(num_tries + 1))
        try:
            footage = prepare_video(Path(job.path), job.source, job.name, self._folder, self._settings, self._detector)
        except (UserError, OSError):
            raise
        except Exception as error:
            footage = _rejected(Reason.FAILED, f"{type(error).__name__}: {error}")
        tries.unlink(missing_ok=True)
        return footage


def _rejected(reason: Reason, detail: str) -> Footage:
    return Footage(0, rejected=(Rejected(reason, 0, 0, detail),))


def run_jobs(jobs: Sequence[Job], folder: Path, settings: Settings, num_workers: int) -> Iterator[str]:
    """Does the jobs on a running Ray; yields the name of each that is done. Raises BadData where the run must end."""
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    num_workers = min(num_workers, len(jobs))
    rows = ray.data.from_items(
        [asdict(job) for job in jobs], override_num_blocks=min(len(jobs), BLOCKS_PER_WORKER * num_workers)
    )
    done = rows.map(
        Worker,  # type: ignore[arg-type]
        fn_constructor_args=(str(folder.resolve()), settings),
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=num_workers, max_tasks_in_flight_per_actor=2),
        num_cpus=1,
    )
    for row in done.iter_rows():
        if row["error"]:
            raise BadData(row["error"])
        yield row["name"]


def connect(address: str, num_workers: int | None) -> int:
    """Joins or starts a Ray; says how many workers it has room for, `num_workers` at most."""
    if "ray" not in sys.modules:
        # `ray start` and `ray.init` differ in their own defaults, and one then refuses the other.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    if not ray.is_initialized():
        own: dict[str, Any] = {"num_cpus": num_workers, "include_dashboard": False} if address == "local" else {}
        ray.init(address=address, logging_level=logging.WARNING, log_to_driver=False, **own)
    room = int(ray.cluster_resources().get("CPU", 1))
    return max(1, min(num_workers or room, room))


def prepare(
    videos: Path, folder: Path, settings: Settings, address: str = "local", num_workers: int | None = None
) -> dict[str, Any]:
    """Fills the data folder from the videos and returns the report (`report`). Raises UserError.

    `num_workers`: as many processes as Ray has CPUs by default.
    """
    jobs, ignored = find_videos(videos, folder)
    # Here too, so that a wrong model is an error at once and not one of a worker.
    load_detector(settings.yunet, settings.landmarks)
    claim(folder, settings)
    found = {job: read_done(folder, job) for job in jobs}
    missing = [job for job, footage in found.items() if footage is None]
    with tqdm(total=len(jobs), initial=len(jobs) - len(missing), desc="preparing", unit="video") as bar:
        if missing:
            room = connect(address, num_workers)
            for _ in run_jobs(missing, folder, settings, room):
                bar.update()
    footages = {job: footage or _must_be_done(folder, job) for job, footage in found.items()}
    made = report(footages, ignored, settings.fps)
    _replace(folder / "rejected.json", json.dumps(made, indent=1))
    clips = tuple(clip for footage in footages.values() for clip in footage.clips)
    if not clips:
        raise BadData(f"no clip came out of {len(jobs)} videos: {folder / 'rejected.json'} says why")
    write_manifest(Manifest(folder, settings.size_px, float(settings.fps), clips))
    return made


def _must_be_done(folder: Path, job: Job) -> Footage:
    footage = read_done(folder, job)
    if footage is None:
        raise BadData(
            f"{_done_path(folder, job)} is not there although its worker wrote it, or {job.source} has changed "
            "meanwhile: put the data folder on storage that all nodes share, and start again"
        )
    return footage


def report(footages: dict[Job, Footage], ignored: Sequence[str], fps: int) -> dict[str, Any]:
    """What has become of the videos: counts, every rejected stretch, what is odd about used ones, ignored files."""
    rows = [(job.source, row) for job, footage in footages.items() for row in footage.rejected]
    stretches, frames = Counter[str](), Counter[str]()
    for _, row in rows:
        stretches[row.reason] += 1
        frames[row.reason] += row.num_frames
    clips = [clip for footage in footages.values() for clip in footage.clips]
    used = {"stretches": len(clips), "frames": sum(clip.num_frames for clip in clips)}
    counts = {str(reason): {"stretches": stretches[reason], "frames": frames[reason]} for reason in sorted(stretches)}
    return {
        "videos": len(footages),
        "frames": sum(footage.num_frames for footage in footages.values()),
        "counts": {"used": used} | counts,
        "rejected": [
            {"source": source, "reason": row.reason, "start_s": round(row.start / fps, 3)}
            | {"num_frames": row.num_frames, "detail": row.detail}
            for source, row in rows
        ],
        "notes": [{"source": job.source, "note": note} for job, f in footages.items() for note in f.notes],
        "ignored": list(ignored),
    }


def table(made: dict[str, Any]) -> str:
    """The counts for people."""
    lines = [f"{'':<16}{'stretches':>10}{'frames':>10}"]
    for name, count in made["counts"].items():
        lines.append(f"{name:<16}{count['stretches']:>10}{count['frames']:>10}")
    lines.append(f"{made['videos']} videos of {made['frames']} frames, {len(made['notes'])} with notes")
    if made["ignored"]:
        lines.append(f"{len(made['ignored'])} files that are no videos by their names were left alone")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(prog="python -m training.prepare", description=(__doc__ or "").splitlines()[0])
    result.add_argument("videos", type=Path, help="folder of videos; those in its folders too")
    result.add_argument("out", type=Path, help="the data folder to fill; all nodes must see it")
    result.add_argument("--size", type=int, default=512, help="side of the clips in pixels")
    result.add_argument("--fps", type=int, default=25, help="frames a second of the clips")
    result.add_argument("--min-frames", type=int, default=32, help="shorter clips are rejected")
    result.add_argument("--max-frames", type=int, default=250, help="longer ones are cut into equal parts")
    result.add_argument("--min-crop", type=int, help="smallest side, in the video's pixels (default: half of --size)")
    result.add_argument("--detector", default="", metavar="PATH", help="YuNet's .onnx (default: the bundled extractor)")
    result.add_argument("--landmarks", default="", metavar="PATH", help="or FaceLandmarker's .task, with MediaPipe")
    result.add_argument("--workers", type=int, help="processes (default: one per CPU)")
    result.add_argument("--address", default=os.environ.get("RAY_ADDRESS", "local"), help="of a Ray cluster, or local")
    return result


def main() -> None:
    """Command line."""
    args = parser().parse_args()
    try:
        limits = Limits(args.min_frames, args.max_frames, args.min_crop or args.size // 2)
        settings = Settings(args.size, args.fps, limits, args.detector, args.landmarks)
        made = prepare(args.videos, args.out, settings, args.address, args.workers)
    except UserError as error:
        sys.exit(f"{error.code}: {error}")
    print(table(made))
    print(f"clips: {args.out}, what is not used: {args.out / 'rejected.json'}")


if __name__ == "__main__":
    main()
