"""The loop that trains one phase, as every worker runs it. Called by `training.task`; knows torch, and no Ray.

A step takes one batch and makes `phase.num_updates` optimiser steps of it, each followed by one of the phase's critic
where it has one. Everything that a step draws and reads is a function of (seed, phase, step, rank), and what it changes
is in the checkpoint: a run that was killed ends bit-equal to one that never was, with as many ranks and threads.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from stages.config import ModelConfig, to_dict
from stages.errors import BadConfig, UserError
from training import checkpoints
from training.checkpoints import Checkpoint, CheckpointFailed, State
from training.clips import Batch
from training.optimise import (
    Learner,
    apply_gradients,
    average_gradients,
    copy_into,
    follow,
    learning_rate,
    make_learner,
    mean_over_ranks,
    new_average,
    optimiser_tensors,
    restore_optimiser,
    share_from_first,
    whole,
)
from training.phases.phase import Draws, Phase, Update, draws
from training.recipes import PHASES, PhaseConfig

MAX_SKIPPED_IN_A_ROW = 20
CHECKPOINTS = "checkpoints"

Metrics = dict[str, float]
Report = Callable[[Metrics], None]
"""Called on every rank, with the same step, after every `log_every` steps and after the last."""

log = logging.getLogger(__name__)


class NotFinite(UserError):
    """The loss or its gradients stay infinite or NaN."""

    code = "not_finite"


@dataclass(frozen=True)
class Run:
    """What a phase's training is: a checkpoint belongs to one run, and only that one goes on from it."""

    phase: str
    model: ModelConfig
    config: PhaseConfig
    seed: int = 0
    num_workers: int = 1
    weights: str = ""
    """Digest of the weights that it starts from."""
    data: str = ""
    """Digest of the manifest that it learns from, whose order of clips follows from their number."""


@dataclass
class Training:
    """A phase while it is trained, on one rank."""

    run: Run
    phase: Phase
    model: Callable[..., Update]
    """The phase as it is called: itself, or wrapped for several ranks."""
    learner: Learner
    critic: Learner | None
    average: dict[str, Tensor]
    """Averaged weights; empty without `ema_decay`."""
    rank: int
    device: torch.device
    num_skipped: int = 0
    num_skipped_in_a_row: int = 0
    num_bad: int = 0
    """Clips that this rank tried in vain since the last report."""
    losses: list[float] = field(default_factory=list)
    """Of the updates since the last report."""
    metrics: dict[str, list[Tensor]] = field(default_factory=dict)
    """What this rank's updates said since the last report."""


def train_phase(
    phase: Phase,
    run: Run,
    batches_from: Callable[[int], Iterator[Batch]],
    place: Path,
    report: Report,
    rank: int = 0,
    device: torch.device | None = None,
    sharded: bool = False,
) -> Phase:
    """Trains a phase to the end, going on from the newest checkpoint in `place`, and returns it with its final weights
    (the averaged ones, where the config asks for them).

    Every rank of `run.num_workers` calls it, with torch.distributed set up where there are several. `batches_from(n)`
    yields the rank's batches from number n on. `sharded`: by FSDP2 instead of DDP. Raises BadResume, NotFinite, and
    CheckpointFailed where the last checkpoint cannot be written.
    """
    training = prepare(phase, run, rank, device or torch.device("cpu"), sharded)
    start, num_steps = _resume(training, place / CHECKPOINTS), run.config.num_steps
    reported, reported_s = start, time.monotonic()
    batches = batches_from(start) if start < num_steps else iter(())
    for step, batch in zip(range(start, num_steps), batches, strict=False):
        train_step(training, batch, step)
        done = step + 1
        if done % run.config.log_every == 0 or done == num_steps:
            now_s = time.monotonic()
            report(_summary(training, done, (done - reported) / (now_s - reported_s)))
            reported, reported_s = done, now_s
        if done % run.config.checkpoint_every == 0 or done == num_steps:
            _save(training, place / CHECKPOINTS, done)
    copy_into(training.learner.parameters, {name: whole(tensor) for name, tensor in training.average.items()})
    return phase


def prepare(phase: Phase, run: Run, rank: int, device: torch.device, sharded: bool) -> Training:
    """A phase ready for its first step: placed, wrapped for several ranks, with fresh optimisers."""
    if phase.critic is not None:
        phase.critic.requires_grad_(False)
    phase.to(device).train()
    model = _wrapped(phase, run.num_workers, device, sharded)
    config = run.config.optimiser
    parameters = {name: parameter for name, parameter in phase.named_parameters() if parameter.requires_grad}
    if not parameters:
        raise BadConfig(f"phase {run.phase} trains nothing: look at its `trained` and `frozen_parts`")
    critic = None
    if phase.critic is not None:
        critic = make_learner(dict(phase.critic.named_parameters()), config.critic_learning_rate, config)
    average = new_average(parameters) if config.ema_decay else {}
    learner = make_learner(parameters, config.learning_rate, config)
    return Training(run, phase, model, learner, critic, average, rank, device)


def _wrapped(phase: Phase, num_workers: int, device: torch.device, sharded: bool) -> Callable[..., Update]:
    """The phase as one of several ranks calls it."""
    if num_workers == 1:
        return phase
    if not sharded:
        # Dropped portraits and poses leave parameters without gradients. And only where DDP looks for such ones does it
        # keep its first buckets, whose order decides the last bits of sums over ranks, also after a resumption.
        return DistributedDataParallel(phase, find_unused_parameters=True, forward_sync_buffers=False)
    touching = _Touching(phase)
    mesh = init_device_mesh(device.type, (num_workers,))
    critic = set(phase.critic.parameters()) if phase.critic is not None else set()
    fully_shard(touching, mesh=mesh, ignored_params=critic)
    return lambda *arguments: touching(*arguments)[1]


class _Touching(nn.Module):
    """A phase whose loss depends on every parameter that learns, be it by nothing.

    FSDP2 reduces the gradients that a rank has: where ranks drop different parts these would not match. And it finds
    the loss only in plain tuples.
    """

    def __init__(self, phase: Phase):
        super().__init__()
        self.phase = phase

    def forward(self, *arguments: Any) -> tuple[Tensor, Update]:
        update: Update = self.phase(*arguments)
        learning = (parameter for parameter in self.phase.parameters() if parameter.requires_grad)
        loss = update.loss + 0.0 * torch.stack([parameter.sum() for parameter in learning]).sum()
        return loss, dataclasses.replace(update, loss=loss)


def train_step(training: Training, batch: Batch, step: int) -> None:
    """All updates of one batch. One that is not finite is left out on all ranks, with the rest of its batch."""
    training.num_bad += len(batch.bad)
    draw = draws(training.run.seed, PHASES.index(training.run.phase), step, training.rank)
    # What networks draw by themselves (dropout) is a function of the step, too.
    torch.manual_seed(draw.torch.initial_seed())
    # Every rank has the buffers of rank 0, which are those in a checkpoint.
    share_from_first(training.phase.buffers())
    carry = None
    for index in range(training.phase.num_updates):
        buffers = {name: buffer.clone() for name, buffer in training.phase.named_buffers()}
        update = _learn(training, batch, draw, step, index, carry)
        if update is None:
            copy_into(dict(training.phase.named_buffers()), buffers)
            _skip(training, step)
            return
        carry = update.carry
    training.num_skipped_in_a_row = 0


def _learn(training: Training, batch: Batch, draw: Draws, step: int, index: int, carry: Any) -> Update | None:
    """One update of the phase and then of its critic; None where a loss or a gradient of any rank is not finite."""
    config = training.run.config
    with torch.autocast(training.device.type, torch.bfloat16, enabled=config.bfloat16):
        update = training.model(batch, draw, step, index, carry)
    update.loss.backward()
    loss = mean_over_ranks(update.loss.detach())
    if not _apply(training, training.learner, loss, step):
        return None
    training.losses.append(float(loss))
    _note(training, update.metrics)
    if training.average:
        follow(training.average, training.learner.parameters, config.optimiser.ema_decay, step)
    if training.critic is not None and update.fake is not None and step >= getattr(config, "critic_from_step", 0):
        return update if _learn_critic(training, training.critic, update, step) else None
    return update


def _apply(training: Training, learner: Learner, loss: Tensor, step: int) -> bool:
    """One optimiser step from the gradients that are there; False, and none, where they or the loss are not finite.

    Both are means over the ranks, so that all ranks decide alike.
    """
    config = training.run.config
    if not torch.isfinite(loss):
        learner.optimiser.zero_grad(set_to_none=True)
        return False
    rate = learning_rate(config.optimiser, learner.peak, step, config.num_steps)
    return apply_gradients(learner, rate, config.optimiser.max_gradient_norm)


def _learn_critic(training: Training, learner: Learner, update: Update, step: int) -> bool:
    """Teaches the critic to tell made pictures from true ones (the logistic loss of both, without penalty).

    Its gradients are averaged here and not by DDP, whose hooks would also fire when the phase's own loss flows through
    the critic.
    """
    critic = training.phase.critic
    assert critic is not None and update.fake is not None and update.real is not None
    critic.requires_grad_(True)
    fake, real = (critic(pictures.float(), update.timesteps) for pictures in (update.fake, update.real))
    loss = F.softplus(fake).mean() + F.softplus(-real).mean()
    loss.backward()
    average_gradients(learner.parameters.values())
    good = _apply(training, learner, mean_over_ranks(loss.detach()), step)
    critic.requires_grad_(False)
    _note(training, {"critic_loss": loss, "critic_real": real.mean(), "critic_fake": fake.mean()})
    return good


def _note(training: Training, metrics: dict[str, Tensor]) -> None:
    for name, value in metrics.items():
        training.metrics.setdefault(name, []).append(value.detach().float())


def _skip(training: Training, step: int) -> None:
    training.num_skipped += 1
    training.num_skipped_in_a_row += 1
    if training.rank == 0:
        log.warning("phase %s, step %d: the loss or a gradient is not finite, left out", training.run.phase, step)
    if training.num_skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
        raise NotFinite(
            f"phase {training.run.phase}, step {step}: loss or gradients were not finite {MAX_SKIPPED_IN_A_ROW} times "
            "in a row: lower optimiser.learning_rate or look at the data"
        )


def _summary(training: Training, done: int, steps_per_s: float) -> Metrics:
    """What is reported after a step, since the last report. `loss` and `num_bad` are over all ranks, the rest of this
    one."""
    config = training.run.config
    num_bad = float(mean_over_ranks(torch.tensor(float(training.num_bad), device=training.device)))
    summary: Metrics = {
        "step": done,
        "loss": sum(training.losses) / len(training.losses) if training.losses else math.nan,
        "samples_per_s": steps_per_s * config.batch_size * training.run.num_workers,
        "learning_rate": learning_rate(config.optimiser, training.learner.peak, done - 1, config.num_steps),
        "num_skipped": training.num_skipped,
        "num_bad": round(num_bad * training.run.num_workers),
    }
    summary |= {name: float(torch.stack(values).mean()) for name, values in training.metrics.items()}
    training.losses.clear()
    training.metrics.clear()
    training.num_bad = 0
    return summary


def _groups(training: Training) -> dict[str, dict[str, Tensor]]:
    """Everything that training changes, in one piece. Collective where it is sharded."""
    buffers = dict(training.phase.named_buffers())
    groups = {
        "weights": {name: whole(parameter) for name, parameter in training.learner.parameters.items()} | buffers,
        "optimiser": optimiser_tensors(training.learner),
        "average": {name: whole(tensor) for name, tensor in training.average.items()},
    }
    if training.critic is not None:
        groups["critic"] = dict(training.critic.parameters)
        groups["critic_optimiser"] = optimiser_tensors(training.critic)
    return groups


def _save(training: Training, folder: Path, done: int) -> None:
    """Writes a checkpoint on rank 0. Where that fails training goes on; after the last step it raises on all ranks."""
    groups = _groups(training)
    failure = None
    if training.rank == 0:
        made_with = checkpoints.made_with(torch.get_num_threads())
        state = State(done, training.num_skipped, json_values(training.run), made_with)
        try:
            checkpoints.save_checkpoint(folder, Checkpoint(state, groups))
        except CheckpointFailed as error:
            failure = error
            log.warning("%s; training goes on", error)
    if done == training.run.config.num_steps and (failure := _from_first(failure)):
        raise failure


def _resume(training: Training, folder: Path) -> int:
    """Takes over the newest checkpoint; the number of steps done. Rank 0 says which one it is."""
    found = checkpoints.newest_checkpoint(folder) if training.rank == 0 else None
    step = _from_first(found.state.step if found else None)
    if step is None:
        return 0
    found = found or checkpoints.load_checkpoint(checkpoints.step_folder(folder, step))
    check_same_run(found.state.run, training.run, folder)
    _warn_of_other_making(training, found.state)
    _restore(training, found)
    return found.state.step


def check_same_run(saved: dict[str, Any], run: Run, where: Path) -> None:
    """Raises BadResume where a checkpoint or finished weights are of another run than this one."""
    defaults = {"model": to_dict(ModelConfig()), "config": to_dict(type(run.config)())}
    checkpoints.check_same(saved, json_values(run), where, json.loads(json.dumps(defaults, default=str)))


def json_values(run: Run) -> dict[str, Any]:
    """A run as it reads back from `state.json`."""
    values: dict[str, Any] = json.loads(json.dumps(to_dict(run), default=str))
    return values


def _restore(training: Training, found: Checkpoint) -> None:
    """Puts a checkpoint into a phase that is ready for its first step."""
    buffers = dict(training.phase.named_buffers())
    copy_into(training.learner.parameters | buffers, found.groups["weights"])
    restore_optimiser(training.learner, found.groups["optimiser"])
    copy_into(training.average, found.groups["average"])
    if training.critic is not None:
        copy_into(training.critic.parameters, found.groups["critic"])
        restore_optimiser(training.critic, found.groups["critic_optimiser"])
    training.num_skipped = found.state.num_skipped


def _warn_of_other_making(training: Training, state: State) -> None:
    now = checkpoints.made_with(torch.get_num_threads())
    other = [f"{key} {value} and now {now[key]}" for key, value in state.made_with.items() if now.get(key) != value]
    if other and training.rank == 0:
        log.warning("the checkpoint was made with %s: the last bits may differ", ", ".join(other))


T = TypeVar("T")


def _from_first(value: T) -> T:
    """What rank 0 has, on every rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]
