"""A phase on Ray Train: as many workers as the run has; where one dies Ray restarts them. Called by `training.run`.

What they then go on from is the newest checkpoint below OUT, not one of Ray's own: reports carry metrics only.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

from stages.errors import UserError
from training.curves import Metrics
from training.task import Task, perform

ERROR = "error.json"
"""Below OUT/PHASE: what is wrong for good, where starting again would not help."""
SPARE_CPUS = 2
"""Beside one for each worker: Ray Data's tasks decode on them."""


class TooFewCpus(UserError):
    """The cluster is too small for the workers."""

    code = "too_few_cpus"


def connect(address: str | None, num_workers: int) -> None:
    """Connects to the cluster at `address`, or else starts Ray on this machine.

    Processors are logical there: one for each worker and two for reading data, whatever the machine has.
    """
    if not address:
        # Ray's own default differs between its entry points: then one refuses the other.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    if ray.is_initialized():
        return
    quiet: dict[str, Any] = {"logging_level": logging.WARNING}
    if address:
        ray.init(address=address, **quiet)
    else:
        ray.init(address="local", num_cpus=num_workers + SPARE_CPUS, include_dashboard=False, **quiet)


def train_on_ray(task: Task, use_gpus: bool, max_failures: int) -> None:
    """Trains the task's phase on the cluster that Ray is connected to; returns when its weights are written.

    Raises UserError with the workers' own code where they say that it cannot go on, TooFewCpus, and Ray's
    TrainingFailedError after more than `max_failures` deaths.
    """
    import ray
    import ray.train
    from ray.train.torch import TorchTrainer

    num_workers = task.run.num_workers
    check_cpus(ray.cluster_resources().get("CPU", 0), num_workers)
    (task.place / ERROR).unlink(missing_ok=True)
    trainer = TorchTrainer(
        worker,
        train_loop_config={"task": task, "use_gpus": use_gpus},
        scaling_config=ray.train.ScalingConfig(
            num_workers=num_workers,
            use_gpu=use_gpus,
            resources_per_worker={"CPU": 1, **({"GPU": 1} if use_gpus else {})},
            # Workers on processors get in each other's way on a node; GPUs talk faster within one.
            placement_strategy="PACK" if use_gpus else "SPREAD",
        ),
        run_config=ray.train.RunConfig(
            name=task.run.phase,
            storage_path=str(task.place / "ray"),
            failure_config=ray.train.FailureConfig(max_failures=max_failures),
        ),
    )
    try:
        trainer.fit()
    finally:
        raise_noted(task.place)


def worker(config: dict[str, Any]) -> None:
    """One worker of the group. What a restart cannot mend is noted, and the next group returns at once."""
    import ray.train
    import ray.train.torch
    import torch

    from training.loading import ray_batches

    task: Task = config["task"]
    if (task.place / ERROR).exists():
        return
    device = ray.train.torch.get_device() if config["use_gpus"] else torch.device("cpu")
    try:
        perform(task, ray.train.get_context().get_world_rank(), device, ray_batches, _report)
    except UserError as error:
        note(task.place, error)
        raise


def _report(metrics: Metrics) -> None:
    import ray.train

    ray.train.report(metrics)


def check_cpus(num_cpus: float, num_workers: int) -> None:
    """Raises TooFewCpus where a cluster cannot hold the workers beside the reading of data."""
    if num_cpus < num_workers + 1:
        raise TooFewCpus(
            f"the cluster has {num_cpus:g} CPUs, {num_workers} workers and the reading of data need "
            f"{num_workers + 1}: give fewer --workers, or start the cluster with more"
        )


def note(place: Path, error: UserError) -> None:
    """Leaves an error for the driver and for the next group of workers."""
    partial = place / f".{ERROR}-{os.getpid()}.part"
    partial.write_text(json.dumps({"message": str(error), "code": error.code}))
    partial.replace(place / ERROR)


def raise_noted(place: Path) -> None:
    """Raises the error that a worker has left, with its code."""
    if (place / ERROR).exists():
        raise UserError(**json.loads((place / ERROR).read_text()))
