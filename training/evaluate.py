"""Measures a weights folder on people it has never seen: `python -m training.evaluate stages/tiny --sheet OUT.png`.

The world knows the exact answer of a cross-reenactment: the portrait's person, drawn with the driver's retargeted
motion. So every figure is against ground truth: PSNR of the whole picture and of the face box, with the portrait shown
unmoved and the autoencoder alone as the lower and the upper bar; and how far estimated poses and expressions are off.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from stages.config import ModelConfig
from stages.images import detector_frames, signed
from stages.keypoints import boxes, pose_from_raw
from stages.messages import CleanChunk, MotionState, Pixels
from stages.pipeline import Stages, load_stages
from training.animation import posed
from training.assets import HELD_OUT
from training.identity import sample_identity
from training.motion import retarget, sample_clip, sample_portrait_motion, to_array
from training.world import canonical_keypoints, render


@dataclass(frozen=True)
class Trial:
    """One held-out portrait and driver, k driving frames, and the true answer."""

    portrait: Pixels
    """(s, s, 3)."""
    driving: Pixels
    """(k, s, s, 3) of another person."""
    truth: Pixels
    """(k, s, s, 3)."""
    face_boxes: NDArray[np.int64]
    """(k, 4) in the true pictures."""


def make_trial(index: int, num_frames: int, config: ModelConfig) -> Trial:
    """The trial of this number: people and motions of seeds that no training uses."""
    rng = np.random.default_rng([HELD_OUT, index])
    person, driver = sample_identity(HELD_OUT + 100 + index), sample_identity(HELD_OUT + 500 + index)
    start = sample_portrait_motion(rng)
    clip = sample_clip(rng, num_frames + 25)[25:]
    shown = [retarget(motion, clip[0], start) for motion in clip]
    size, motions = config.size_px, np.stack([to_array(motion) for motion in shown])
    points = posed(np.repeat(canonical_keypoints(person)[None], len(shown), 0), motions)
    return Trial(
        portrait=render(person, start, size),
        driving=np.stack([render(driver, motion, size) for motion in clip]),
        truth=np.stack([render(person, motion, size) for motion in shown]),
        face_boxes=boxes(points, size, config.keypoints).numpy(),
    )


def animate(stages: Stages, portrait: Pixels, driving: Pixels, seed: int = 0) -> Pixels:
    """Frames (k, s, s, 3) that answer the driving frames; k must be a multiple of `chunk_frames`."""
    motion, reference, denoise, decode = stages.motion, stages.reference, stages.denoise, stages.decode
    assert motion and reference and denoise and decode
    window = stages.config.window
    state: MotionState = motion.open(portrait)
    drawing = denoise.open(reference.open(portrait), state.portrait_tokens, seed)
    tail = np.repeat(driving[-1:], window.num_transition_frames, 0)
    frames = np.concatenate([driving, tail])
    shown = []
    for start in range(0, len(frames), window.chunk_frames):
        [(state, chunk)] = motion.run([state], [frames[start : start + window.chunk_frames]])
        [(drawing, clean, keyframe)] = denoise.run([drawing], [chunk])
        if keyframe is not None:
            drawing = denoise.add_keyframe(drawing, reference.keyframe(keyframe))
        shown += decode.run([clean])
    return np.concatenate(shown)[window.num_transition_frames :]


def picture_psnr(a: Pixels, b: Pixels) -> float:
    """dB of uint8 pictures."""
    return float(10 * np.log10(255**2 / (np.mean((a.astype(np.float64) - b) ** 2) + 1e-9)))


def face_psnr(a: Pixels, b: Pixels, face_boxes: NDArray[np.int64]) -> float:
    """dB inside the face boxes, from the mean error of all of them."""
    errors = [
        np.mean((x[y1:y2, x1:x2].astype(np.float64) - z[y1:y2, x1:x2]) ** 2)
        for x, z, (x1, y1, x2, y2) in zip(a, b, face_boxes, strict=True)
    ]
    return float(10 * np.log10(255**2 / np.mean(errors)))


def measure(stages: Stages, trials: list[Trial]) -> dict[str, tuple[float, float]]:
    """Mean (whole picture, face box) PSNR in dB of the model and of its two bars."""
    rows: dict[str, list[tuple[float, float]]] = {"static portrait": [], "animated": [], "autoencoder": []}
    for trial in trials:
        shown = {
            "static portrait": np.repeat(trial.portrait[None], len(trial.truth), 0),
            "animated": animate(stages, trial.portrait, trial.driving),
            "autoencoder": reconstruct(stages, trial.truth),
        }
        for name, frames in shown.items():
            rows[name].append((picture_psnr(frames, trial.truth), face_psnr(frames, trial.truth, trial.face_boxes)))
    return {
        name: (float(np.mean([r[0] for r in row])), float(np.mean([r[1] for r in row]))) for name, row in rows.items()
    }


@torch.inference_mode()
def reconstruct(stages: Stages, frames: Pixels) -> Pixels:
    """Frames through the autoencoder alone."""
    assert stages.reference and stages.decode
    latents = stages.reference.vae.encode(signed(frames))
    return stages.decode.run([CleanChunk(latents.numpy())])[0]


@torch.inference_mode()
def pose_errors(stages: Stages, num_people: int) -> dict[str, float]:
    """Mean absolute errors of the keypoint extractor on held-out people: degrees, and head place in picture halves."""
    assert stages.motion
    pictures, motions = [], []
    for index in range(num_people):
        rng = np.random.default_rng([HELD_OUT, 7, index])
        motion = sample_clip(rng, 40)[-1]
        pictures.append(render(sample_identity(HELD_OUT + 1000 + index), motion, stages.config.size_px))
        motions.append(to_array(motion))
    side = stages.config.keypoints.image_px
    images = detector_frames(signed(np.stack(pictures)), side)
    pose = pose_from_raw(stages.motion.keypoint_extractor(images))
    truth = np.stack(motions)
    degrees = np.abs(pose.degrees - truth[:, :3]).mean(0)
    place = float(np.abs(pose.translation[:, :2] - truth[:, 3:5]).mean())
    return dict(zip(("pitch", "yaw", "roll"), degrees.tolist(), strict=True)) | {"place": place}


def sheet(stages: Stages, trials: list[Trial], num_columns: int = 8) -> Pixels:
    """Per trial three rows: driving frames, what the model shows, the truth; the portrait stands on the left."""
    rows = []
    for trial in trials:
        shown = animate(stages, trial.portrait, trial.driving)
        at = np.linspace(0, len(shown) - 1, num_columns).astype(int)
        for frames in (trial.driving, shown, trial.truth):
            rows.append(np.concatenate([trial.portrait, *frames[at]], 1))
    return np.concatenate(rows)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m training.evaluate", description=__doc__.splitlines()[0])
    parser.add_argument("weights", help="a weights folder, or tiny")
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--frames", type=int, default=48, help="driving frames per trial")
    parser.add_argument("--sheet", type=Path, help="also write a contact sheet of the first four trials here")
    args = parser.parse_args()
    stages = load_stages(args.weights, ("motion", "reference", "denoise", "decode"), "cpu", 1)
    trials = [make_trial(index, args.frames, stages.config) for index in range(args.trials)]
    for name, (whole, face) in measure(stages, trials).items():
        print(f"{name:16s} {whole:5.2f} dB whole picture, {face:5.2f} dB face box")
    print(", ".join(f"{name} off by {error:.3f}" for name, error in pose_errors(stages, 60).items()))
    if args.sheet:
        cv2.imwrite(str(args.sheet), sheet(stages, trials[:4])[..., ::-1])


if __name__ == "__main__":
    main()
