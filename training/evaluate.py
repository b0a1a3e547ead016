"""Measures weights on people and motions they have never seen.

`python -m training.evaluate --weights tiny --identities 8 --seconds 3 --seed 0 --out out/evaluation`

The world knows the exact answer of a reenactment (`training.trials`), so pictures are compared with the truth, beside
the unmoved portrait, the portrait warped in 2D, and the autoencoder's own reconstruction as the ceiling; probes
(`training.probes`) say whether motion and identity arrive. docs/training.md explains every key of the JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from tqdm import tqdm

from stages.errors import BadConfig, UserError
from stages.images import detector_frames, signed
from stages.messages import Floats, Pixels
from stages.pipeline import Stages, load_stages
from training import measures
from training.answers import answer, answer_shuffled, model_fps, reconstruct, stream
from training.arcface import ArcFace
from training.perceptual import load_perceptual, picture_distances
from training.probes import NUM_POSE, READINGS, Probes, load_probes, readings_of
from training.trials import (
    FPS,
    Cast,
    Trial,
    decoy_driving,
    draw_all,
    impostors,
    looped_cast,
    trials,
    warped,
)
from training.world import write_clip

PROBED = READINGS[: READINGS.index("gaze_y") + 1]
"""The readings that are reported: those that the probes read with an R² of 0.9 or more."""
BARS = ("static", "warp", "ceiling", "shuffled_driver")
NUM_IMPOSTORS = 16
NUM_SHOWN = 4
"""Trials on the sheet and in the video."""
NUM_COLUMNS = 8
DRIFT_S = 10
NOT_BUILT = "FVD, and AED and APD by SMIRK on real faces"


@dataclass(frozen=True)
class Options:
    """What is measured."""

    weights: str
    identities: int
    seconds: float
    seed: int
    drift_seconds: float = 0.0
    vgg: Path | None = None
    lins: Path | None = None
    identity_model: Path | None = None
    device: str = "auto"
    num_threads: int = 2


@dataclass(frozen=True)
class Instruments:
    """What measures: probes, a perceptual distance and, where its weights are given, ArcFace."""

    probes: Probes
    distance: measures.Distance
    arcface: ArcFace | None


@dataclass(frozen=True)
class Outcome:
    """One trial's result: figures, and series to be correlated over all trials, all (k, len(READINGS))."""

    figures: dict[str, float]
    driver: Floats
    """True readings of the driver."""
    output: Floats
    renders: Floats
    """The probe's readings of our output and of the true renders."""


@dataclass(frozen=True)
class Shown:
    """Pictures to look at, of one trial."""

    portrait: Pixels
    driving: Pixels
    truth: Pixels
    output: Pixels


def evaluate(stages: Stages, options: Options) -> tuple[dict[str, Any], list[Shown]]:
    """All measures of one model (the keys of the JSON), and the pictures of the first trials."""
    instruments = load_instruments(options)
    num_frames = whole_chunks(stages, options.seconds)
    other = decoy_driving(options.seed, num_frames, stages.config)
    strangers = impostors(options.seed, NUM_IMPOSTORS, stages.config)
    outcomes: list[Outcome] = []
    shown: list[Shown] = []
    errors: list[dict[str, float]] = []
    fps = 0.0
    drawn = trials(options.seed, options.identities, num_frames, stages.config)
    for trial in tqdm(drawn, total=options.identities, desc="evaluating", unit="identity", file=sys.stderr):
        seen = versions(stages, trial, other, options.seed)
        outcomes.append(outcome(instruments, trial, seen, strangers))
        errors.append(keypoint_errors(stages, trial))
        fps = fps or model_fps(stages, trial.portrait, np.concatenate([trial.driving] * 2))
        if len(shown) < NUM_SHOWN:
            shown.append(Shown(trial.portrait, trial.driving, trial.truth, seen["cross"]))
        other = trial.driving
    report = summary(outcomes) | {
        "keypoint_errors": means(errors),
        "probe_scores": instruments.probes.scores,
        "drift_db": drift(stages, options),
        "model_fps": fps,
        "weights": options.weights,
        "model": stages.config.name,
        "identities": options.identities,
        "seconds": num_frames / FPS,
        "seed": options.seed,
        "perceptual_is": "lpips" if options.vgg else "substitute",
        "not_built": NOT_BUILT,
    }
    return rounded(report), shown


def load_instruments(options: Options) -> Instruments:
    """Probes and distances. Raises BadWeights."""
    perceptual = load_perceptual(options.vgg, options.lins)
    arcface = ArcFace(options.identity_model) if options.identity_model else None
    return Instruments(load_probes(), partial(picture_distances, perceptual), arcface)


def whole_chunks(stages: Stages, seconds: float) -> int:
    """How many frames whole chunks of about this many seconds have; at least two chunks."""
    size = stages.config.window.chunk_frames
    return max(2, round(seconds * FPS / size)) * size


def versions(stages: Stages, trial: Trial, other: Pixels, seed: int) -> dict[str, Pixels]:
    """What stands beside the truth, (k, s, s, 3) each; `cross` is the model's answer to another person's frames."""
    return {
        "cross": answer(stages, trial.portrait, trial.driving, seed),
        "self": answer(stages, trial.portrait, trial.self_driving, seed),
        "static": np.repeat(trial.portrait[None], len(trial.truth), 0),
        "warp": warped(trial),
        "ceiling": reconstruct(stages, trial.truth),
        "shuffled_driver": answer_shuffled(stages, trial.portrait, trial.driving, other, seed),
    }


def outcome(
    instruments: Instruments, trial: Trial, seen: dict[str, Pixels], strangers: tuple[Pixels, Floats]
) -> Outcome:
    """All figures of one trial."""
    looked = {
        name: instruments.probes.look(frames, trial.shown_motions)
        for name, frames in (seen | {"truth": trial.truth}).items()
        if name in ("cross", "static", "ceiling", "truth")
    }
    read = {name: readings for name, (readings, _) in looked.items()}
    figures = picture_figures(trial, seen) | distance_figures(instruments.distance, trial, seen)
    figures |= reading_figures(read) | identity_figures(instruments.probes, trial, looked, strangers)
    if instruments.arcface:
        figures |= arcface_figures(instruments.arcface, trial, seen)
    return Outcome(figures, readings_of(trial.driving_motions), read["cross"], read["truth"])


def picture_figures(trial: Trial, seen: dict[str, Pixels]) -> dict[str, float]:
    """PSNR of everything, and how sharp and how calm the model's answer is."""
    figures = {}
    for name in ("cross", "self", *BARS):
        part = "" if name == "cross" else f"{name}_"
        figures[f"psnr_{part}db"] = measures.psnr(seen[name], trial.truth)
        figures[f"psnr_{part}face_db"] = measures.face_psnr(seen[name], trial.truth, trial.face_boxes)
    figures |= {f"{name}_psnr": figures[f"psnr_{part}db"] for name, part in (("cross", ""), ("self", "self_"))}
    return figures | {
        "sharpness": measures.sharpness(seen["cross"], seen["ceiling"]),
        "flicker": measures.flicker(seen["cross"], trial.truth),
        "flicker_ceiling": measures.flicker(seen["ceiling"], trial.truth),
    }


def distance_figures(distance: measures.Distance, trial: Trial, seen: dict[str, Pixels]) -> dict[str, float]:
    """L1, SSIM, perceptual distance and tLP of both reenactments and their bars."""
    figures: dict[str, float] = {}
    for name in ("self", "cross", "static", "warp", "ceiling"):
        figures[f"{name}_l1"] = measures.l1(seen[name], trial.truth)
        figures[f"{name}_ssim"] = measures.ssim(seen[name], trial.truth)
        figures[f"{name}_perceptual"] = measures.perceptual(seen[name], trial.truth, distance)
        figures[f"{name}_tlp"] = measures.tlp(seen[name], trial.truth, distance)
    return figures


def reading_figures(read: dict[str, Floats]) -> dict[str, float]:
    """Mean distances of the probe's readings from those of the truth: `apd` of pose, degrees, `aed` of expression.

    Of expression only what the probes read well: brows and the mouth's width are left out.
    """
    figures: dict[str, float] = {}
    for name, part in (("cross", ""), ("static", "_static"), ("ceiling", "_ceiling")):
        error = np.abs(read[name] - read["truth"]).mean(0)
        figures |= {
            f"apd{part}": float(error[:NUM_POSE].mean()),
            f"aed{part}": float(error[NUM_POSE : len(PROBED)].mean()),
        }
    return figures


def identity_figures(
    probes: Probes, trial: Trial, looked: dict[str, tuple[Floats, Floats]], strangers: tuple[Pixels, Floats]
) -> dict[str, float]:
    """Mean cosines: of our answer and of the ceiling with the portrait, and of our answer with strangers' portraits."""
    portrait, others = probes.look(trial.portrait[None], trial.rest[None])[1], probes.look(*strangers)[1]
    ours, ceiling = looked["cross"][1], looked["ceiling"][1]
    return {
        "identity": measures.mean_cosine(ours, portrait),
        "identity_impostor": measures.mean_cosine(ours, others),
        "identity_ceiling": measures.mean_cosine(ceiling, portrait),
    }


def arcface_figures(arcface: ArcFace, trial: Trial, seen: dict[str, Pixels]) -> dict[str, float]:
    """ID-SIM as on real faces; the impostor is the driver."""
    portrait = arcface.embed(trial.portrait[None], trial.portrait_points[None])
    ours, ceiling = (arcface.embed(seen[name], trial.shown_points) for name in ("cross", "ceiling"))
    driver = arcface.embed(trial.driving, trial.driving_points)
    return {
        "arcface_identity": measures.mean_cosine(ours, portrait),
        "arcface_impostor": measures.mean_cosine(ours, driver),
        "arcface_ceiling": measures.mean_cosine(ceiling, portrait),
    }


@torch.inference_mode()
def keypoint_errors(stages: Stages, trial: Trial) -> dict[str, float]:
    """Mean absolute errors of the keypoint extractor on the driving frames: degrees, and place in picture halves."""
    pose = stages.motion.poses(detector_frames(signed(trial.driving), stages.config.keypoints.image_px))
    degrees = np.abs(pose.degrees - trial.driving_motions[:, :3]).mean(0)
    place = np.abs(pose.translation[:, :2] - trial.driving_motions[:, 3:5]).mean()
    return {name: float(v) for name, v in zip(("pitch", "yaw", "roll", "place"), (*degrees, place), strict=True)}


def drift(stages: Stages, options: Options) -> float | None:
    """dB that the last ten seconds of one long stream lose (negative) against its first ten; None for short streams.

    Both parts ask for the same motion. The rest of the stream is drawn, answered and forgotten.
    """
    if options.drift_seconds < 2 * DRIFT_S:
        return None
    num_frames, num_compared = (whole_chunks(stages, seconds) for seconds in (options.drift_seconds, DRIFT_S))
    cast = looped_cast(options.seed, num_frames, num_compared)
    portrait = draw_all(cast.person, (cast.rest,), stages.config.size_px)[0]
    size = stages.config.window.chunk_frames
    answers: list[Pixels] = []
    chunks = stream(stages, portrait, driving_chunks(stages, cast), options.seed)
    for index, frames in enumerate(tqdm(chunks, total=num_frames // size, desc="drift", unit="chunk", file=sys.stderr)):
        if index * size < num_compared or index * size >= num_frames - num_compared:
            answers.append(frames)
    compared = np.concatenate(answers)
    truth = draw_all(cast.person, cast.shown[:num_compared], stages.config.size_px)
    return measures.psnr(compared[-num_compared:], truth) - measures.psnr(compared[:num_compared], truth)


def driving_chunks(stages: Stages, cast: Cast) -> Iterator[Pixels]:
    """The driver's frames, drawn chunk by chunk."""
    size = stages.config.window.chunk_frames
    for start in range(0, len(cast.driving), size):
        yield draw_all(cast.driver, cast.driving[start : start + size], stages.config.size_px)


def summary(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Means of all figures over the trials, correlations over all their frames, and the probes' R² on true renders.

    That of gaze is over frames whose eyes are at least half open, as in the probes' own scores. `probe_r_within` counts
    only what differs from each trial's mean: a probe reads everybody's pitch with a bias, in true renders too.
    """
    parts = ("driver", "output", "renders")
    driver, output, renders = (np.concatenate([getattr(result, part) for result in outcomes]) for part in parts)
    driver_within, output_within, renders_within = (
        np.concatenate([centred(getattr(result, part)) for result in outcomes]) for part in parts
    )
    columns = {name: READINGS.index(name) for name in PROBED}
    is_open = driver[:, columns["blink"]] <= 0.5
    return means([result.figures for result in outcomes]) | {
        "probe_r": {name: measures.correlation(driver[:, c], output[:, c]) for name, c in columns.items()},
        "probe_r_renders": {name: measures.correlation(driver[:, c], renders[:, c]) for name, c in columns.items()},
        "probe_r_within": {
            name: measures.correlation(driver_within[:, c], output_within[:, c]) for name, c in columns.items()
        },
        "probe_r_within_renders": {
            name: measures.correlation(driver_within[:, c], renders_within[:, c]) for name, c in columns.items()
        },
        "probe_r2_renders": {
            name: measures.explained(*(part[is_open | (not name.startswith("gaze")), c] for part in (driver, renders)))
            for name, c in columns.items()
        },
    }


def centred(readings: Floats) -> Floats:
    """Readings (n, r) as differences from their mean."""
    return readings - readings.mean(axis=0)


def means(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean of every key."""
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


def rounded(value: Any) -> Any:
    """Figures to five decimals, at any depth."""
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    return round(value, 5) if isinstance(value, float) else value


# What people look at


def table(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = [
        f"{report['model']} ({report['weights']}): {report['identities']} identities, {report['seconds']:g} s each, "
        f"seed {report['seed']}",
        "",
        _row("", "dB", "dB face", "L1", "SSIM", "percept.", "tLP"),
    ]
    for name in ("static", "warp", "shuffled_driver", "cross", "self", "ceiling"):
        part = "" if name == "cross" else f"{name}_"
        keys = (f"psnr_{part}db", f"psnr_{part}face_db", *(f"{name}_{m}" for m in ("l1", "ssim", "perceptual", "tlp")))
        lines.append(_row(name.replace("_", " "), *(report.get(key) for key in keys)))
    lines += ["", _row("probe", *PROBED)]
    for label, key in (
        ("r, output", "probe_r"),
        ("r, true renders", "probe_r_renders"),
        ("R², same", "probe_r2_renders"),
        ("r within, output", "probe_r_within"),
        ("r within, same", "probe_r_within_renders"),
    ):
        lines.append(_row(label, *report[key].values()))
    identity, impostor, ceiling = (report[key] for key in ("identity", "identity_impostor", "identity_ceiling"))
    share = (identity - impostor) / (ceiling - impostor)
    errors = report["keypoint_errors"]
    return "\n".join(
        [
            *lines,
            "",
            f"identity {identity:.3f} (impostor {impostor:.3f}, ceiling {ceiling:.3f}: {share:.2f} of the way)",
            f"sharpness {report['sharpness']:.3f}, "
            f"flicker {report['flicker']:.2f} (ceiling {report['flicker_ceiling']:.2f})",
            f"expression off by {report['aed']:.3f}, pose by {report['apd']:.2f}° "
            f"(static {report['aed_static']:.3f}, {report['apd_static']:.2f}°)",
            f"keypoints off by {errors['yaw']:.2f}° yaw, {errors['pitch']:.2f}° pitch, {errors['roll']:.2f}° roll",
            f"drift {'not measured' if report['drift_db'] is None else format(report['drift_db'], '+.2f') + ' dB'}, "
            f"{report['model_fps']:.1f} frames/s of model time",
        ]
    )


def _row(name: str, *cells: float | str | None) -> str:
    shown = [
        "-" if c is None else c if isinstance(c, str) else f"{c:.2f}" if abs(c) >= 2 else f"{c:.4f}" for c in cells
    ]
    return f"{name:16s}" + "".join(f"{cell:>9s}" for cell in shown)


def sheet(shown: Sequence[Shown]) -> Pixels:
    """Per trial three rows of eight moments: driving frames, our answer, the truth; the portrait stands on the left."""
    rows = []
    for pictures in shown:
        at = np.linspace(0, len(pictures.output) - 1, NUM_COLUMNS).astype(int)
        for frames in (pictures.driving, pictures.output, pictures.truth):
            rows.append(np.concatenate([pictures.portrait, *frames[at]], 1))
    return np.concatenate(rows)


def side_by_side(shown: Sequence[Shown]) -> list[Pixels]:
    """Video frames (s, 4 s, 3): portrait, driving, truth, our answer; one trial after the other."""
    return [
        np.concatenate([pictures.portrait, driving, truth, output], 1)
        for pictures in shown
        for driving, truth, output in zip(pictures.driving, pictures.truth, pictures.output, strict=True)
    ]


def write_folder(folder: Path, report: dict[str, Any], shown: Sequence[Shown]) -> None:
    """Writes evaluation.json, sheet.png and video.mp4."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "evaluation.json").write_text(json.dumps(report, indent=1) + "\n")
    cv2.imwrite(str(folder / "sheet.png"), sheet(shown)[..., ::-1])
    write_clip(folder / "video.mp4", side_by_side(shown), FPS, 18)


def parser() -> argparse.ArgumentParser:
    """The command line's options."""
    result = argparse.ArgumentParser(
        prog="python -m training.evaluate", description="Measures weights on people and motions they have never seen."
    )
    result.add_argument("--weights", default="tiny", help="weights folder, or tiny (default)")
    result.add_argument("--identities", type=int, default=8, help="how many trials (default 8)")
    result.add_argument("--seconds", type=float, default=3.0, help="length of each (default 3)")
    result.add_argument("--seed", type=int, default=0, help="which people and motions (default 0)")
    result.add_argument(
        "--drift-seconds",
        type=float,
        default=120.0,
        help="length of the stream whose ends are compared (default 120; 0: none)",
    )
    result.add_argument("--out", type=Path, help="folder for evaluation.json, sheet.png and video.mp4")
    result.add_argument("--json", action="store_true", help="print only the JSON")
    result.add_argument("--lpips-vgg", type=Path, help="torchvision's VGG16 weights, for LPIPS")
    result.add_argument("--lpips-lins", type=Path, help="the lpips package's weights/v0.1/vgg.pth")
    result.add_argument(
        "--identity-model", type=Path, help="an ArcFace ONNX file (112x112), for ID-SIM as on real faces"
    )
    result.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default auto)")
    result.add_argument("--threads", type=int, default=2, help="torch threads (default 2)")
    return result


def checked(args: argparse.Namespace) -> Options:
    """The options. Raises BadConfig where they make no sense."""
    if args.identities < 1 or args.seconds <= 0 or args.seed < 0 or args.threads < 1:
        raise BadConfig("--identities and --threads must be at least 1, --seconds above 0, --seed 0 or more")
    if args.drift_seconds and args.drift_seconds < 2 * DRIFT_S:
        raise BadConfig(f"--drift-seconds compares {DRIFT_S} s at both ends: give {2 * DRIFT_S} or more, best 120")
    return Options(
        args.weights, args.identities, args.seconds, args.seed, args.drift_seconds,
        args.lpips_vgg, args.lpips_lins, args.identity_model, args.device, args.threads,
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    args = parser().parse_args(argv)
    try:
        options = checked(args)
        stages = load_stages(options.weights, device=options.device, num_threads=options.num_threads)
        report, shown = evaluate(stages, options)
    except UserError as error:
        print(f"error ({error.code}): {error}", file=sys.stderr)
        return 2
    if args.out:
        write_folder(args.out, report, shown)
    print(json.dumps(report) if args.json else table(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
