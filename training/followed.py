"""Does a real person move a drawn portrait? Labels of a driving video against what can be read off our answer to it.

`python -m training.followed --portrait ada --driving me.mp4 --labels me.json`, for people who judge weights. Nothing
but the labels is believed of the driver: a JSON object with the lists `frames` (counted from 0, increasing), `yaw`
(degrees, positive towards the picture's left), `mouth` (0 closed to 1 wide open) and `blink` (1 both eyes closed).

Read it so: `output` is the result, the probes' readings of our frames; `keypoint_extractor` and `motion_encoder`, read
off the driver, say where the motion was lost before the denoiser; `spread` is the standard deviation of each series.
"""

from __future__ import annotations

import argparse
import json
import math
import operator
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice, pairwise, tee
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from stages.animate import animate_video
from stages.errors import UserError
from stages.images import detector_frames, signed
from stages.messages import Floats, Pixels, Pose
from stages.pipeline import Stages, load_stages
from stages.portraits import load_portrait, read_portrait
from stages.video import TimedFrame, VideoWriter, read_video, square_resize
from training.known import read_expression
from training.measures import correlation
from training.motion import EXPRESSION
from training.probes import READINGS, Probes, load_probes

MOVEMENTS = ("yaw", "mouth", "blink")
"""What is labelled, beside `frames`."""
AS_READING = {"yaw": "yaw", "mouth": "jaw", "blink": "blink"}
"""A movement's name among the probes' readings."""
AS_EXPRESSION = {"mouth": ("jaw",), "blink": ("blink_left", "blink_right")}
"""A movement's names in the motion tokens."""
MIN_LABELS = 3
BATCH = 16
"""So many labelled frames go through a network together."""

Series = dict[str, Floats]
"""Movement to its values (n,) in the labelled frames."""


class BadLabels(UserError):
    """The labels cannot be read, or do not belong to the video."""

    code = "bad_labels"


@dataclass(frozen=True)
class Labels:
    """What a person saw in n frames of the driving video."""

    frames: tuple[int, ...]
    """Increasing, counted from 0."""
    movements: Series


@dataclass(frozen=True)
class Seen:
    """The n labelled frames and our answers to them, each (n, s, s, 3)."""

    driving: Pixels
    output: Pixels


def read_labels(path: Path) -> Labels:
    """The labels in a file. Raises BadLabels."""
    try:
        found = json.loads(path.read_text())
        frames = [operator.index(frame) for frame in found["frames"]]
        movements = {name: np.array(found[name], np.float32) for name in MOVEMENTS}
    except OSError as error:
        raise BadLabels(f"{path} cannot be read ({error.strerror}): give a file of labels") from None
    except (ValueError, TypeError, KeyError) as error:
        wanted = ", ".join(("frames", *MOVEMENTS))
        raise BadLabels(f"{path} must be a JSON object with the lists {wanted}, all of numbers ({error!r})") from None
    lengths = {name: values.shape for name, values in movements.items()} | {"frames": (len(frames),)}
    if len(set(lengths.values())) != 1:
        raise BadLabels(f"{path} has lists of unequal lengths, {lengths}: label every frame in all of them")
    if not all(np.isfinite(values).all() for values in movements.values()):
        raise BadLabels(f"{path} has values that are no finite numbers: leave such frames out of all lists")
    if len(frames) < MIN_LABELS or frames[0] < 0 or any(b <= a for a, b in pairwise(frames)):
        raise BadLabels(f"{path} must label at least {MIN_LABELS} frames, in increasing order, counted from 0")
    return Labels(tuple(frames), movements)


def check_length(driving: Path, labels: Labels) -> None:
    """Decodes the video as far as it is labelled, since headers lie. Raises BadLabels, BadVideo."""
    last = labels.frames[-1]
    num_frames = sum(1 for _ in islice(read_video(driving), last + 1))
    if num_frames <= last:
        raise BadLabels(f"frame {last} is labelled, but {driving} has {num_frames} frames: label this video's frames")


def answered(
    stages: Stages, portrait: Pixels, frames: Iterable[TimedFrame], seed: int
) -> Iterator[tuple[TimedFrame, TimedFrame]]:
    """Each driving frame, cropped to the model's square, with the frame that answers it."""
    size = stages.config.size_px
    # Cropped before the tee, which holds whatever is inside the window.
    asked, driving = tee(TimedFrame(square_resize(frame.rgb, size), frame.time_s) for frame in frames)
    yield from zip(asked, animate_video(stages, portrait, driving, seed), strict=True)


def watch(
    stages: Stages, portrait: Pixels, driving: Path, labels: Labels, seed: int = 0, video: Path | None = None
) -> Seen:
    """Runs the video as far as it is labelled; writes driver and answer side by side where a file is given.

    portrait (s, s, 3). Raises BadVideo, BadPortrait, BadOutput.
    """
    num_frames, labelled = labels.frames[-1] + 1, frozenset(labels.frames)
    pairs = answered(stages, portrait, islice(read_video(driving), num_frames), seed)
    kept: list[tuple[Pixels, Pixels]] = []
    with ExitStack() as stack:
        writer = stack.enter_context(VideoWriter(video, audio_from=driving)) if video else None
        bar = tqdm(pairs, total=num_frames, desc="animating", unit="frame", file=sys.stderr)
        for index, (asked, shown) in enumerate(bar):
            if writer:
                writer.write(np.concatenate([asked.rgb, shown.rgb], 1), asked.time_s)
            if index in labelled:
                kept.append((asked.rgb, shown.rgb))
    asked_frames, shown_frames = zip(*kept, strict=True)
    return Seen(np.stack(asked_frames), np.stack(shown_frames))


@torch.inference_mode()
def poses_of(stages: Stages, pictures: Pixels) -> Pose:
    """What the keypoint extractor finds in pictures (n, s, s, 3)."""
    parts = []
    for start in range(0, len(pictures), BATCH):
        images = detector_frames(signed(pictures[start : start + BATCH]), stages.config.keypoints.image_px)
        parts.append(stages.motion.poses(images))
    names = ("canonical", "degrees", "translation", "scale")
    return Pose(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


def probed(stages: Stages, probes: Probes, pictures: Pixels) -> Series:
    """The probes' readings of pictures (n, s, s, 3), whose heads the keypoint extractor places.

    The extractor must count places and scales as the drawn world does; that of a model trained on it does.
    """
    pose = poses_of(stages, pictures)
    motions = np.zeros((len(pictures), 14), np.float32)
    motions[:, 3:5], motions[:, 5:6] = pose.translation[:, :2], pose.scale
    readings, _ = probes.look(pictures, motions)
    return {name: readings[:, READINGS.index(AS_READING[name])] for name in MOVEMENTS}


@torch.inference_mode()
def encoded(stages: Stages, portrait: Pixels, driving: Pixels) -> tuple[Series, int]:
    """Mouth and blink as the motion tokens of driving frames (n, s, s, 3) say, and how many frames had no face."""
    state, tokens, num_no_face = stages.motion.open(portrait), [], 0
    for start in range(0, len(driving), BATCH):
        frames = driving[start : start + BATCH]
        [(state, motion)] = stages.motion.run([state], [frames])
        tokens.append(motion.tokens[-len(frames) :])
        num_no_face += sum(motion.no_face)
    encoder = stages.motion.motion_encoder
    found = torch.from_numpy(np.concatenate(tokens)).to(encoder.pe.device)
    said = read_expression(found, encoder, stages.config.motion_encoder).float().cpu().numpy()
    series = {
        name: said[:, [EXPRESSION.index(part) for part in parts]].mean(1) for name, parts in AS_EXPRESSION.items()
    }
    return series, num_no_face


def readings(stages: Stages, probes: Probes, portrait: Pixels, seen: Seen) -> tuple[dict[str, Series], int]:
    """Who reads what, and the number of labelled frames without a face.

    `output`: probes, off our answer. `keypoint_extractor` and `motion_encoder`: our networks, off the driver's frames.
    """
    expression, num_no_face = encoded(stages, portrait, seen.driving)
    return {
        "output": probed(stages, probes, seen.output),
        "keypoint_extractor": {"yaw": poses_of(stages, seen.driving).degrees[:, 1]},
        "motion_encoder": expression,
    }, num_no_face


def correlations(labels: Labels, read: dict[str, Series]) -> dict[str, dict[str, float]]:
    """Pearson's r of each reader's series with the labels; 0 where one of the two stands still."""
    return {
        reader: {name: correlation(labels.movements[name], values) for name, values in series.items()}
        for reader, series in read.items()
    }


def spreads(labels: Labels, read: dict[str, Series]) -> dict[str, dict[str, float]]:
    """Standard deviations of all series, degrees for `yaw`: what hardly moves cannot correlate well."""
    everyone = {"labels": labels.movements} | read
    return {
        reader: {name: float(values.std()) for name, values in series.items()} for reader, series in everyone.items()
    }


def report_of(labels: Labels, read: dict[str, Series], num_no_face: int) -> dict[str, Any]:
    """The figures that `--json` prints."""
    return {
        "correlation": correlations(labels, read),
        "spread": spreads(labels, read),
        "num_frames": len(labels.frames),
        "num_no_face": num_no_face,
    }


def table(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = [
        f"{report['weights']}, {report['portrait']}: {report['num_frames']} labelled frames, "
        f"{report['num_no_face']} without a face",
        "",
        _row("r (spread)", *MOVEMENTS),
    ]
    for reader, spread in report["spread"].items():
        found = report["correlation"].get(reader, {})
        cells = [f"{_cell(found.get(name))} ({spread[name]:.2f})" if name in spread else "" for name in MOVEMENTS]
        lines.append(_row(reader.replace("_", " "), *cells))
    return "\n".join(lines)


def _row(label: str, *cells: str) -> str:
    return f"{label:20}" + "".join(f"{cell:>16}" for cell in cells)


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def write_series(path: Path, report: dict[str, Any], labels: Labels, read: dict[str, Series]) -> None:
    """The report with every value it came from, as JSON."""
    everyone = {"labels": labels.movements} | read
    series = {reader: {name: v.round(4).tolist() for name, v in found.items()} for reader, found in everyone.items()}
    path.write_text(json.dumps(report | {"frames": list(labels.frames), "series": series}, indent=1) + "\n")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """The whole job. Raises UserError."""
    labels = read_labels(options.labels)
    check_length(options.driving, labels)
    picture = read_portrait(options.portrait)
    probes = load_probes()
    stages = load_stages(options.weights, device=options.device, num_threads=options.threads)
    portrait = load_portrait(picture, stages.config.size_px)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
    video = options.out / "followed.mp4" if options.out else None
    seen = watch(stages, portrait, options.driving, labels, options.seed, video)
    read, num_no_face = readings(stages, probes, portrait, seen)
    about = {"weights": options.weights, "portrait": options.portrait, "seed": options.seed}
    report = report_of(labels, read, num_no_face) | about
    if options.out:
        write_series(options.out / "followed.json", report, labels, read)
    return report


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="python -m training.followed", description="Measures whether a labelled real driver moves a portrait."
    )
    result.add_argument("--weights", default="tiny", help="weights folder, or tiny (default)")
    result.add_argument("--portrait", required=True, help="picture file, or the name of a bundled portrait")
    result.add_argument("--driving", required=True, type=Path, help="video of the driver")
    result.add_argument("--labels", required=True, type=Path, help="JSON: frames, yaw, mouth, blink")
    result.add_argument("--out", type=Path, help="folder for followed.json and followed.mp4 (driver, ours)")
    result.add_argument("--json", action="store_true", help="print the figures as JSON")
    result.add_argument("--seed", type=int, default=0, help="of the noise (default 0)")
    result.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default auto)")
    result.add_argument("--threads", type=int, default=0, help="torch threads (default 0: as many as a server's)")
    return result


def rounded(value: Any) -> Any:
    """Figures to four decimals, at any depth."""
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    return round(value, 4) if isinstance(value, float) and math.isfinite(value) else value


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    options = parser().parse_args(argv)
    try:
        report = rounded(run(options))
    except UserError as error:
        print(f"error ({error.code}): {error}", file=sys.stderr)
        return 2
    print(json.dumps(report) if options.json else table(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
