"""Pre-rendered people of the world: per person a portrait, then frames. Called by `training.quick`.

Drawing on the fly cannot feed the training, so people are drawn once, in shards of `SHARD` people, and kept as uint8.
A *still* set has independent motions (many poses for few pixels); a *clip* set has what a session shows: the transition
from the portrait to the first driving frame, then the driving frames, retargeted to the portrait (section 6.3).
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from stages.messages import Pixels
from training.identity import sample_identity
from training.motion import Motion, blend, retarget, sample_clip, sample_motion, sample_portrait_motion, to_array
from training.world import canonical_keypoints, render

Kind = Literal["still", "clip"]
SHARD = 10


@dataclass(frozen=True)
class People:
    """n people with k frames each, the first frame of each being the portrait."""

    seeds: NDArray[np.int64]
    """(n,)."""
    pixels: Pixels
    """(n, k, s, s, 3)."""
    motions: NDArray[np.float32]
    """(n, k, 14) in the order of `Motion`'s fields."""
    canonical: NDArray[np.float32]
    """(n, K, 3) the true keypoints of each person."""


def still_motions(seed: int, num_frames: int) -> list[Motion]:
    """A portrait's motion, then independent ones at the portrait's scale and near its place."""
    rng = np.random.default_rng([seed, 8])
    portrait = sample_portrait_motion(rng)
    motions = [portrait]
    for _ in range(num_frames - 1):
        free = sample_motion(rng, 0.9) if rng.random() < 0.5 else sample_clip(rng, 40)[int(rng.integers(40))]
        x, y = portrait.x + rng.uniform(-0.1, 0.1), portrait.y + rng.uniform(-0.07, 0.07)
        motions.append(dataclasses.replace(free, x=float(x), y=float(y), scale=portrait.scale))
    return motions


def clip_motions(seed: int, num_transition: int, num_driving: int) -> list[Motion]:
    """A portrait's motion, `num_transition` frames leading from it, and a retargeted driving clip."""
    rng = np.random.default_rng([seed, 9])
    portrait = sample_portrait_motion(rng)
    driving = sample_clip(rng, num_driving + 25)[25:]
    shown = [retarget(motion, driving[0], portrait) for motion in driving]
    lead = [blend(portrait, shown[0], weight) for weight in np.linspace(0, 1, num_transition + 1)[:-1]]
    return [portrait, *lead, *shown]


def draw_people(seeds: list[int], kind: Kind, num_frames: int, size: int) -> People:
    """Draws people; for clips `num_frames` counts the portrait, 12 transition frames and the driving frames."""
    pixels, motions, canonical = [], [], []
    for seed in seeds:
        identity = sample_identity(seed)
        plan = still_motions(seed, num_frames) if kind == "still" else clip_motions(seed, 12, num_frames - 13)
        pixels.append(np.stack([render(identity, motion, size) for motion in plan]))
        motions.append(np.stack([to_array(motion) for motion in plan]))
        canonical.append(canonical_keypoints(identity))
    return People(np.array(seeds), np.stack(pixels), np.stack(motions), np.stack(canonical))


def prerender(folder: Path, kind: Kind, seeds: range, num_frames: int, size: int) -> None:
    """Draws the people of `seeds` into shards that are not there yet. Several processes may share a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for first in tqdm(range(seeds.start, seeds.stop, SHARD), desc=f"{kind}s", unit="shard"):
        path = folder / f"{kind}-{first:07d}.npz"
        if path.exists():
            continue
        people = draw_people(list(range(first, first + SHARD)), kind, num_frames, size)
        partial = path.with_suffix(f".{os.getpid()}.part")
        with partial.open("wb") as file:
            np.savez(file, **{field.name: getattr(people, field.name) for field in dataclasses.fields(people)})
        partial.rename(path)


def load_people(folder: Path, kind: Kind) -> People:
    """All people drawn so far."""
    shards = list(_shards(folder, kind))
    return People(*(np.concatenate(parts) for parts in zip(*shards, strict=True)))


def _shards(folder: Path, kind: Kind) -> Iterator[tuple[NDArray, ...]]:
    for path in sorted(folder.glob(f"{kind}-*.npz")):
        with np.load(path) as stored:
            yield tuple(stored[field.name] for field in dataclasses.fields(People))
