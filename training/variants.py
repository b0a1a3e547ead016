"""The paper's ablations as variants of a recipe, and the training of their weights. Called by `training.ablations`.

A variant shares with `full` the phases before the first one that it changes, and all of them where it only changes the
evaluation. Phases lie where `training.run --out OUT/NAME` would put them, and like there a finished one is not trained
again and a broken one goes on from its last checkpoint:

    OUT/full/distill  OUT/full/stream  OUT/without-gan/distill  OUT/without-gan/stream  OUT/chunk-causal/stream  ...
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from stages.errors import BadWeights
from training.checkpoints import newest_state
from training.clips import plain_batches
from training.curves import show
from training.engine import CHECKPOINTS
from training.handover import WEIGHTS
from training.phases.animation import NETWORKS
from training.phases.stream import updates_per_clip
from training.recipes import DistillConfig, Recipe, changed
from training.run import is_finished, make_task
from training.task import Task, perform

PAPER_THRESHOLD = 17
SWEPT_THRESHOLDS = (15, 16, 18, 20)
"""Of the paper's table 3; a recipe's own threshold stands for the paper's 17, and these are scaled like it."""
FULL = ("full/distill", "full/stream")


@dataclass(frozen=True)
class Variant:
    """One row of the tables."""

    name: str
    difference: str
    """From `full`, in words."""
    chain: tuple[str, ...] = FULL
    """NAME/PHASE of every phase behind its weights, in order; those of its own name are trained for it alone."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the recipe, by dotted name, in which its own phases differ."""
    window: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the window's config in which only its evaluation differs."""


@dataclass(frozen=True)
class Setting:
    """What all variants share."""

    recipe: Recipe
    """As `full` is trained: with its seed and its budget of steps."""
    weights: Path
    """Folder with all networks, as phase `motion` leaves it."""
    data: tuple[str, ...]
    """As `training.run --data`."""
    out: Path
    num_threads: int
    device: torch.device
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the recipe that the command has set, by dotted name."""


def variants(recipe: Recipe) -> dict[str, Variant]:
    """All variants of a recipe by name, `full` first."""
    window = recipe.model.window
    half = window.chunk_frames // 2 if window.chunk_frames % 2 == 0 else 1
    every = [
        Variant("full", "motion, distill, stream as in the recipe"),
        Variant("without-distillation", "stream follows motion", ("without-distillation/stream",)),
        Variant(
            "without-gan", "distill without a discriminator", ("without-gan/distill", "without-gan/stream"),
            {"distill.adversarial_weight": 0.0, "stream.adversarial_weight": 0.0},
        ),
        Variant(
            "without-sliding", "stream learns from single windows of noised truth", _own_stream("without-sliding"),
            {"stream.sliding": False, "stream.portrait_start": False},
        ),
        Variant("without-keyframes", "no historical keyframes", window={"max_keyframes": 0}),
        Variant(
            "without-interpolated-start", "the first driving frame's motion at once",
            window={"interpolated_start": False},
        ),
        Variant(
            "chunk-causal", "frames see only their own and cleaner chunks", _own_stream("chunk-causal"),
            {"model.unet.chunk_causal": window.chunk_frames},
        ),
        Variant("half-chunk", f"chunk_frames {half}", _own_stream("half-chunk"), {"model.window.chunk_frames": half}),
        *(_threshold(number, window.keyframe_threshold) for number in SWEPT_THRESHOLDS),
    ]  # fmt: skip
    return {variant.name: variant for variant in every}


def _own_stream(name: str) -> tuple[str, str]:
    return FULL[0], f"{name}/stream"


def _threshold(number: int, own: float) -> Variant:
    scaled = own * number / PAPER_THRESHOLD
    return Variant(f"threshold-{number}", f"keyframe_threshold {scaled:.4g}", window={"keyframe_threshold": scaled})


def scheduled(config: DistillConfig, phase: str, num_steps: int) -> dict[str, Any]:
    """Changes of a recipe that give a phase another number of steps; what begins at some step moves in proportion."""
    share = num_steps / config.num_steps
    begins = {
        "optimiser.num_warmup_steps": config.optimiser.num_warmup_steps,
        "adversarial_from_step": config.adversarial_from_step,
        "critic_from_step": config.critic_from_step,
    }
    moved = {f"{phase}.{name}": round(share * step) for name, step in begins.items()}
    return {f"{phase}.num_steps": num_steps} | moved


def recipe_of(variant: Variant, recipe: Recipe) -> Recipe:
    """A variant's recipe; its phase `stream` makes as many optimiser updates as that of `recipe`, up to whole clips."""
    own = changed(recipe, dict(variant.changes))
    updates, own_updates = (updates_per_clip(part.stream, part.model.window) for part in (recipe, own))
    num_steps = max(1, round(recipe.stream.num_steps * updates / own_updates))
    return changed(own, scheduled(own.stream, "stream", num_steps))


def check_weights(folder: Path) -> None:
    """Raises BadWeights where a network is missing, which the phases would otherwise draw at random."""
    missing = [name for name in NETWORKS if not (folder / f"{name}.safetensors").exists()]
    if missing:
        raise BadWeights(f"{folder} lacks {', '.join(missing)}: give the weights folder that phase motion has left")


def trained(variant: Variant, setting: Setting) -> Path:
    """The weights folder of a variant; trains the phases behind it that are not finished. Raises UserError."""
    every, weights = variants(setting.recipe), setting.weights
    for place in variant.chain:
        owner, phase = place.split("/")
        weights = train(every[owner], phase, weights, setting)
    return weights


def train(owner: Variant, phase: str, weights: Path, setting: Setting) -> Path:
    """The weights folder of one phase of one variant, trained in this process unless it is finished."""
    given = Namespace(
        out=setting.out / owner.name,
        data=list(setting.data),
        workers=1,
        threads_per_worker=setting.num_threads,
        fsdp=False,
    )
    task = make_task(given, recipe_of(owner, setting.recipe), phase, weights)
    if not is_finished(task):
        _perform(task, f"{owner.name}, {phase}", setting.device)
    return task.place / WEIGHTS


def _perform(task: Task, title: str, device: torch.device) -> None:
    task.place.mkdir(parents=True, exist_ok=True)
    begun = newest_state(task.place / CHECKPOINTS)
    num_done = begun.step if begun else 0
    with tqdm(total=task.run.config.num_steps, initial=num_done, desc=title, unit="step", leave=False) as bar:
        perform(task, 0, device, plain_batches, lambda metrics: show(bar, metrics))
