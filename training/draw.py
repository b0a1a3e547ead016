"""Draws a data folder of people of the world: `python -m training.draw OUT --clips 4000 --kind poses`.

`poses`: a portrait, then independent motions that cover the whole range (for phases on single frames).
`talk`: what a session shows, natural curves from the transition on (for phase `stream` and for loading tests).
Drawing is repeatable: a clip is a pure function of its seed, and a second run draws what is not there yet.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from training.identity import sample_identity
from training.layout import (
    BadData,
    Boxes,
    Clip,
    Manifest,
    Truth,
    claim_folder,
    truth_path,
    video_path,
    write_boxes,
    write_manifest,
    write_truth,
)
from training.motion import (
    Motion,
    blend,
    clamped,
    retarget,
    sample_clip,
    sample_motion,
    sample_portrait_motion,
    to_array,
)
from training.world import canonical_keypoints, feature_boxes, render, write_clip

FPS = 25.0
NUM_TRANSITION_FRAMES = 12


@dataclass(frozen=True)
class Plan:
    """Everything a worker needs to draw one clip."""

    folder: Path
    kind: str
    seed: int
    num_frames: int
    size_px: int

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.seed:07d}"


def pose_motions(rng: np.random.Generator, num_frames: int) -> list[Motion]:
    """A portrait's motion, then independent ones at the portrait's scale and near its place."""
    portrait = sample_portrait_motion(rng)
    motions = [portrait]
    for _ in range(num_frames - 1):
        free = sample_motion(rng, 1.1) if rng.random() < 0.5 else _moment(rng)
        x, y = portrait.x + rng.uniform(-0.12, 0.12), portrait.y + rng.uniform(-0.08, 0.08)
        motions.append(dataclasses.replace(free, x=float(x), y=float(y), scale=portrait.scale))
    return motions


def _moment(rng: np.random.Generator) -> Motion:
    return clamped(sample_clip(rng, 40, energy=rng.uniform(0.8, 1.8))[int(rng.integers(40))])


def talk_motions(rng: np.random.Generator, num_frames: int) -> list[Motion]:
    """A portrait's motion, frames that lead from it to the first retargeted driving frame, then driving frames."""
    portrait = sample_portrait_motion(rng)
    num_driving = max(num_frames - 1 - NUM_TRANSITION_FRAMES, 1)
    driving = [clamped(m) for m in sample_clip(rng, num_driving + 25, energy=rng.uniform(0.8, 1.8))[25:]]
    shown = [retarget(motion, driving[0], portrait) for motion in driving]
    lead = [blend(portrait, shown[0], weight) for weight in np.linspace(0, 1, NUM_TRANSITION_FRAMES + 1)[:-1]]
    return [portrait, *lead, *shown][:num_frames]


KINDS: dict[str, Callable[[np.random.Generator, int], list[Motion]]] = {"poses": pose_motions, "talk": talk_motions}


def draw_clip(plan: Plan) -> Clip:
    """Draws and writes one clip, unless it is there."""
    clip = Clip(plan.name, plan.num_frames, f"person {plan.seed}")
    if truth_path(plan.folder, plan.name).exists():
        return clip
    cv2.setNumThreads(1)
    identity = sample_identity(plan.seed)
    motions = KINDS[plan.kind](np.random.default_rng([plan.seed, 21]), plan.num_frames)
    frames = [render(identity, motion, plan.size_px) for motion in motions]
    path = video_path(plan.folder, plan.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Independent frames gain nothing from prediction; and full colour resolution, since sharpness is what is trained.
    write_clip(path, frames, int(FPS), 14, "yuv444p", 1 if plan.kind == "poses" else 12, "veryfast")
    parts = [feature_boxes(identity, motion, plan.size_px) for motion in motions]
    names = [field.name for field in dataclasses.fields(Boxes)]
    write_boxes(plan.folder, plan.name, Boxes(*(np.stack([part[name] for part in parts]) for name in names)))
    truth = Truth(np.stack([to_array(motion) for motion in motions]), canonical_keypoints(identity), plan.seed)
    write_truth(plan.folder, plan.name, truth)
    return clip


def draw_data(folder: Path, kind: str, seeds: range, num_frames: int, size_px: int, num_workers: int) -> Manifest:
    """Draws a clip per seed with several processes and writes the manifest."""
    claim_folder(folder, "draw.json", {"kind": kind, "num_frames": num_frames, "size_px": size_px})
    plans = [Plan(folder, kind, seed, num_frames, size_px) for seed in seeds]
    # One thread each: several processes whose matrix products all use every core take three times as long.
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(num_workers, multiprocessing.get_context("spawn")) as pool:
        drawn = pool.map(draw_clip, plans, chunksize=4)
        clips = tuple(tqdm(drawn, total=len(plans), desc=f"drawing {kind}", unit="clip"))
    manifest = Manifest(folder, size_px, FPS, clips)
    write_manifest(manifest)
    return manifest


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m training.draw", description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="the data folder to write")
    parser.add_argument("--kind", choices=tuple(KINDS), default="talk")
    parser.add_argument("--clips", type=int, default=100, help="how many people, one clip each")
    parser.add_argument("--frames", type=int, default=52, help="frames per clip")
    parser.add_argument("--size", type=int, default=256, help="side of the pictures in pixels")
    parser.add_argument("--first-seed", type=int, default=0, help="seed of the first person")
    parser.add_argument("--workers", type=int, default=2, help="processes that draw")
    args = parser.parse_args()
    seeds = range(args.first_seed, args.first_seed + args.clips)
    try:
        manifest = draw_data(args.out, args.kind, seeds, args.frames, args.size, args.workers)
    except BadData as error:
        parser.error(str(error))
    print(f"{len(manifest.clips)} clips of {args.frames} frames in {args.out}")


if __name__ == "__main__":
    main()
