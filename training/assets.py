"""Draws the bundled portraits and the bundled driving clip: `python -m training.assets`.

People and clip come from seeds that no training draws (`HELD_OUT` and above), so they are unseen by every weights file.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import cv2
import numpy as np

from training.identity import sample_identity
from training.motion import Motion, sample_clip
from training.world import render, write_clip

HELD_OUT = 900_000
"""Identity seeds from here on are never trained on."""
PORTRAITS = {"ada": 900_020, "ben": 900_004, "emi": 900_035, "femi": 900_012, "finn": 900_019, "nora": 900_011}
DRIVER = 900_030
CLIP_SEED = 14
CLIP_S, FPS = 12, 25
POSE = Motion(pitch=-1.0, y=0.04, scale=0.62, smile=0.4)
"""Of every portrait; the head's turn differs a little from person to person."""


def write_portraits(folder: Path, size: int) -> None:
    """One PNG per person, named in lower case."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, seed in PORTRAITS.items():
        turn = float(np.random.default_rng(seed).uniform(-9, 9))
        picture = render(sample_identity(seed), dataclasses.replace(POSE, yaw=turn, gaze_x=0.012 * turn), size, 2.0)
        cv2.imwrite(str(folder / f"{name}.png"), picture[..., ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 9])


def driving_motions() -> list[Motion]:
    """The bundled clip: a person who starts facing the camera, then talks, turns, blinks and nods."""
    motions = sample_clip(np.random.default_rng([CLIP_SEED, 10]), CLIP_S * FPS, FPS, energy=1.1)
    rest = dataclasses.replace(POSE, x=motions[0].x, y=motions[0].y, scale=motions[0].scale)
    return [dataclasses.replace(m, **_eased(rest, m, index)) for index, m in enumerate(motions)]


def _eased(rest: Motion, motion: Motion, index: int) -> dict[str, float]:
    """The first 0.6 s blend from facing the camera into the curve."""
    weight = min(index / (0.6 * FPS), 1.0)
    turns = ("pitch", "yaw", "roll", "smile", "brow")
    return {name: (1 - weight) * getattr(rest, name) + weight * getattr(motion, name) for name in turns}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m training.assets", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("stages/assets"))
    parser.add_argument("--size", type=int, default=512, help="side of the pictures in pixels")
    args = parser.parse_args()
    write_portraits(args.out / "portraits", args.size)
    driver = sample_identity(DRIVER)
    write_clip(args.out / "driving.mp4", [render(driver, motion, args.size) for motion in driving_motions()], FPS, 24)


if __name__ == "__main__":
    main()
