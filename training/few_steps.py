"""What distillation buys: single held-out frames, sampled in few steps before and after it. Called by
`training.ablations --distillation-table`.

The denoiser acts as an image model, without guidance and without its temporal modules. It is told the portrait of a
person whom no training sees, and pose and expression of the frame that is asked for, from where the recipe's phase
`motion` has them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from einops import repeat
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from stages.config import ModelConfig
from stages.decode import DecodeStage
from stages.messages import CleanChunk, Pixels
from stages.networks.vae import Vae
from stages.schedule import NUM_TRAIN_TIMESTEPS, add_noise, signal_fractions, step
from training import measures
from training.clips import Batch
from training.evaluate import means
from training.handover import load_networks, start_model
from training.layout import Boxes
from training.phases.animation import NETWORKS, AnimationPhase, Scene, without_temporal
from training.phases.build import build_phase
from training.phases.phase import draws
from training.recipes import Recipe
from training.trials import FPS, as_arrays, boxes_of, draw_all, make_cast, project_all
from training.world import canonical_keypoints, feature_boxes

NUM_FRAMES = 8
"""Frames asked for of each person, a second apart."""
MANY_STEPS = 20
"""As the paper's phase motion is validated; more than the levels of any window."""
NOISE = 2
"""Key of the noise, which is the same in all rows."""


@dataclass(frozen=True)
class Still:
    """One person of whom frames are asked for."""

    batch: Batch
    """One sample: the portrait, then NUM_FRAMES frames."""
    face_boxes: NDArray[np.int64]
    """(NUM_FRAMES, 4)."""

    @property
    def truth(self) -> Pixels:
        """(NUM_FRAMES, s, s, 3)."""
        return self.batch.pixels[0, 1:]


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    weights: str
    """before or after distillation; bars of comparison: portrait (unmoved), autoencoder (the truth through it)."""
    num_steps: int | None
    figures: dict[str, float]


def table(
    recipe: Recipe, before: Path, after: Path, num_people: int, distance: measures.Distance, device: torch.device
) -> list[Row]:
    """The rows: 1, `num_levels` and 20 steps before, 1 and `num_levels` after, and what they lie between.

    Raises BadWeights, BadConfig.
    """
    people = list(stills(recipe.seed, num_people, recipe.model))
    few = (1, recipe.model.window.num_levels)
    models = {name: image_model(recipe, folder, device) for name, folder in (("before", before), ("after", after))}
    asked = [("before", count) for count in (*few, MANY_STEPS)] + [("after", count) for count in few]
    rows = bars(models["before"], people, distance)
    for name, count in tqdm(asked, desc="few steps", unit="row", leave=False):
        answers = [drawn(models[name], still, count, recipe.seed, index) for index, still in enumerate(people)]
        rows.append(Row(name, count, figures(people, answers, distance)))
    return rows


def stills(seed: int, num_people: int, model: ModelConfig) -> Iterator[Still]:
    """Held-out people and the frames asked for, as one batch each; a pure function of the seed."""
    for index in range(num_people):
        cast = make_cast(seed, index, NUM_FRAMES * FPS)
        motions = (cast.rest, *cast.shown[::FPS])
        boxes = [feature_boxes(cast.person, motion, model.size_px) for motion in motions]
        batch = Batch(
            pixels=draw_all(cast.person, motions, model.size_px)[None],
            boxes=np.stack([[parts[name] for name in Boxes.__dataclass_fields__] for parts in boxes])[None],
            motions=as_arrays(motions)[None],
            canonical=canonical_keypoints(cast.person)[None],
            clips=np.array([index]),
        )
        yield Still(batch, boxes_of(project_all(cast.person, motions[1:]), model))


def image_model(recipe: Recipe, weights: Path, device: torch.device) -> AnimationPhase:
    """The networks of a folder as phase `motion` calls them, with nothing dropped, disturbed or augmented."""
    config = replace(recipe.motion, pose_noise=0.0, augment=0.0)
    exact = replace(recipe, model=start_model(recipe.model, weights), motion=config)
    networks = load_networks(NETWORKS, exact.model, weights, recipe.seed, may_be_fresh=False)
    phase = build_phase("motion", exact, networks, device).eval()
    assert isinstance(phase, AnimationPhase)
    return phase


@torch.inference_mode()
def drawn(phase: AnimationPhase, still: Still, num_steps: int, seed: int, index: int) -> Pixels:
    """The model's answer (NUM_FRAMES, s, s, 3) in so many steps."""
    draw = draws(seed, NOISE, index, 0)
    scene = phase.scene(still.batch, draw, whole=True)
    timesteps = [int(t) for t in spread_timesteps(num_steps)]
    latents = sample(phase, scene, timesteps, draw.normal(scene.latents[0]))
    return decoded(phase, latents)


def spread_timesteps(num_steps: int) -> NDArray[np.int64]:
    """(num_steps,) from the noisiest down to the cleanest, evenly; for one step the noisiest alone."""
    return np.linspace(NUM_TRAIN_TIMESTEPS - 1, 0, num_steps).round().astype(np.int64)


def sample(phase: AnimationPhase, scene: Scene, timesteps: Sequence[int], noise: Tensor) -> Tensor:
    """Clean latents (f, c, h, w) of a scene of one sample: deterministic steps from the noised portrait, where the
    window lets frames enter too, over falling timesteps; noise (f, c, h, w)."""
    window = phase.model.window
    levels = torch.cat([signal_fractions(window)[list(timesteps)], torch.ones(1)]).to(noise.device)
    start = repeat(scene.portraits, "1 c h w -> f c h w", f=len(noise))
    latents = add_noise(start, noise, levels[:1])
    with without_temporal(phase.denoiser):
        for timestep, (now, then) in zip(timesteps, pairwise(levels), strict=True):
            times = torch.full((len(noise),), timestep, device=noise.device)
            answer = phase.denoiser(latents[None], times, scene.motion, scene.pose, scene.memories)[0]
            latents, clean = step(answer.float(), latents, now[None], then[None], window.prediction)
    return clean


def decoded(phase: AnimationPhase, latents: Tensor) -> Pixels:
    """Latents (f, c, h, w) to pictures (f, s, s, 3)."""
    stage = DecodeStage(phase.model, phase.network("vae", Vae))
    return stage.run([CleanChunk(latents.cpu().numpy())])[0]


@torch.inference_mode()
def bars(phase: AnimationPhase, people: Sequence[Still], distance: measures.Distance) -> list[Row]:
    """What every answer lies between: the portrait as it is, and the truth through the autoencoder."""
    portraits = [np.repeat(still.batch.pixels[0, :1], NUM_FRAMES, 0) for still in people]
    scenes = [phase.scene(still.batch, draws(0, NOISE, 0, 0), whole=True) for still in people]
    ceilings = [decoded(phase, scene.latents[0]) for scene in scenes]
    named = (("portrait", portraits), ("autoencoder", ceilings))
    return [Row(name, None, figures(people, answers, distance)) for name, answers in named]


def figures(people: Sequence[Still], answers: Sequence[Pixels], distance: measures.Distance) -> dict[str, float]:
    """Means over people; sharpness is that of the truth's gradients."""
    return means(
        [
            {
                "psnr_db": measures.psnr(answer, still.truth),
                "psnr_face_db": measures.face_psnr(answer, still.truth, still.face_boxes),
                "perceptual": measures.perceptual(answer, still.truth, distance),
                "sharpness": measures.sharpness(answer, still.truth),
            }
            for still, answer in zip(people, answers, strict=True)
        ]
    )


def markdown(rows: Sequence[Row]) -> str:
    """The table for people."""
    lines = ["| weights | steps | dB | dB face | perceptual | sharpness |", "|---|---|---|---|---|---|"]
    for row in rows:
        f = row.figures
        shown = (f"{f['psnr_db']:.2f}", f"{f['psnr_face_db']:.2f}", f"{f['perceptual']:.4f}", f"{f['sharpness']:.3f}")
        lines.append("| " + " | ".join((row.weights, str(row.num_steps or "–"), *shown)) + " |")
    return "\n".join(lines)
