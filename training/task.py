"""One phase of a run as it travels to the workers, and what each of them does with it.

Performed in the calling process by `training.run --local`, and by Ray Train's workers (`training.workers`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from stages.allocator import keep_freed_memory
from training.clips import Batch, Sampling
from training.curves import Curves, Metrics
from training.engine import Report, Run, train_phase
from training.handover import hand_on, load_networks, whole_networks
from training.layout import BadData, Manifest, read_manifest
from training.phases.build import build_phase, networks_of
from training.recipes import Recipe

STARTS_FROM_WEIGHTS = ("official",)
"""Recipes whose networks are never drawn from the seed."""


class Batches(Protocol):
    """`training.clips.plain_batches` or `training.loading.ray_batches`."""

    def __call__(
        self,
        manifest: Manifest,
        sampling: Sampling,
        batch_size: int,
        seed: int,
        rank: int,
        world_size: int,
        start_batch: int = 0,
    ) -> Iterator[Batch]: ...


@dataclass(frozen=True)
class Task:
    """Everything a worker must know. Folders are absolute and, with several nodes, on storage that they share."""

    run: Run
    recipe: Recipe
    data: Path
    place: Path
    """OUT/PHASE."""
    weights: Path | None
    num_threads: int
    """Of torch, in each worker."""
    sharded: bool = False


def checked_manifest(task: Task) -> Manifest:
    """The task's data. Raises BadData where there is none or where it is of another size than the model."""
    manifest = read_manifest(task.data)
    if manifest.size_px != task.run.model.size_px:
        raise BadData(f"{task.data} has clips of {manifest.size_px} px, the model is of {task.run.model.size_px} px")
    return manifest


def perform(task: Task, rank: int, device: torch.device, batches: Batches, report: Report) -> None:
    """Trains the phase as one of its workers; rank 0 writes its curves, checkpoints and, at the end, its weights."""
    _prepare_torch(task, device)
    run, manifest, curves = task.run, checked_manifest(task), Curves(task.place)
    may_be_fresh = task.recipe.name not in STARTS_FROM_WEIGHTS
    networks = load_networks(networks_of(run.phase), run.model, task.weights, run.seed, may_be_fresh)
    phase = build_phase(run.phase, task.recipe, networks, device, task.weights)

    def batches_from(start: int) -> Iterator[Batch]:
        config = run.config
        return batches(manifest, config.sampling, config.batch_size, run.seed, rank, run.num_workers, start)

    def note(metrics: Metrics) -> None:
        if rank == 0:
            curves.write(metrics)
        report(metrics)

    phase = train_phase(phase, run, batches_from, task.place, note, rank, device, task.sharded)
    learned = whole_networks(phase)
    if rank == 0:
        hand_on(phase.finished(), learned, run, task.weights, task.place)


def _prepare_torch(task: Task, device: torch.device) -> None:
    """Threads, and on the CPU algorithms whose results do not vary from run to run."""
    torch.set_num_threads(task.num_threads)
    keep_freed_memory()
    torch.manual_seed(task.run.seed)
    if device.type == "cpu":
        torch.use_deterministic_algorithms(True, warn_only=True)
        # Costs time and only matters to programs that read what they have not written.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
