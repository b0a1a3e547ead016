"""How parameters learn: AdamW with a schedule, clipping, averaged weights, and means over the ranks of a run.

Called by `training.engine`. A tensor may be sharded over ranks (FSDP2); `whole` and `placed_like` lead out and in.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from training.recipes import OptimiserConfig

LEAST_RATE = 0.02
"""Share of the peak that the cosine schedule ends at."""


@dataclass(frozen=True)
class Learner:
    """Parameters by name and the optimiser that moves them: a phase's networks, or its critic."""

    parameters: dict[str, nn.Parameter]
    optimiser: torch.optim.AdamW
    peak: float
    """Learning rate at the top of the schedule."""


def make_learner(parameters: dict[str, nn.Parameter], peak: float, config: OptimiserConfig) -> Learner:
    """AdamW over these parameters. Its fused form does not know sharded tensors."""
    first, second = config.betas
    optimiser = torch.optim.AdamW(
        parameters.values(),
        lr=peak,
        betas=(first, second),
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        fused=not any(isinstance(parameter, DTensor) for parameter in parameters.values()),
    )
    return Learner(parameters, optimiser, peak)


def learning_rate(config: OptimiserConfig, peak: float, step: int, num_steps: int) -> float:
    """The rate of step 0 to num_steps - 1: a linear rise, then level or along a half cosine to a fiftieth."""
    rise = min(1.0, (step + 1) / max(config.num_warmup_steps, 1))
    if config.schedule == "constant":
        return peak * rise
    share = step / max(num_steps - 1, 1)
    return peak * rise * (LEAST_RATE + (1 - LEAST_RATE) * 0.5 * (1 + math.cos(math.pi * share)))


def apply_gradients(learner: Learner, rate: float, max_norm: float) -> bool:
    """Clips the gradients, takes one optimiser step and drops them. False, and no step, where they are not finite."""
    norm = nn.utils.clip_grad_norm_(learner.parameters.values(), max_norm)
    finite = bool(torch.isfinite(whole(norm)))
    if finite:
        for group in learner.optimiser.param_groups:
            group["lr"] = rate
        learner.optimiser.step()
    learner.optimiser.zero_grad(set_to_none=True)
    return finite


def mean_over_ranks(value: Tensor) -> Tensor:
    """The mean of a tensor over all ranks: not finite on every rank as soon as it is not on one."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    total = value.detach().clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replaces gradients by their means over the ranks, for what is not wrapped; a missing one counts as zeros."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    chosen = list(parameters)
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in chosen]
    mean = mean_over_ranks(torch.cat([gradient.flatten() for gradient in gradients]))
    for parameter, part in zip(chosen, mean.split([p.numel() for p in chosen]), strict=True):
        parameter.grad = part.view_as(parameter)


def share_from_first(tensors: Iterable[Tensor]) -> None:
    """Overwrites tensors by those of rank 0, in one message for each type of number."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    chosen = list(tensors)
    for dtype in dict.fromkeys(tensor.dtype for tensor in chosen):
        alike = [tensor for tensor in chosen if tensor.dtype == dtype]
        together = torch.cat([tensor.flatten() for tensor in alike])
        dist.broadcast(together, src=0)
        for tensor, part in zip(alike, together.split([tensor.numel() for tensor in alike]), strict=True):
            tensor.copy_(part.view_as(tensor))


def new_average(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Averaged weights before the first update."""
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


@torch.no_grad()
def follow(average: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter], decay: float, step: int) -> None:
    """Moves the averaged weights towards the parameters; faster in the first steps, to forget where they started."""
    share = 1 - min(decay, (1 + step) / (10 + step))
    for name, tensor in average.items():
        tensor.lerp_(parameters[name].detach(), share)


def optimiser_tensors(learner: Learner) -> dict[str, Tensor]:
    """The optimiser's state as `<parameter>|<what>`, without parameters that have never had a gradient.

    Collective where tensors are sharded: every rank calls it.
    """
    state = learner.optimiser.state
    return {
        f"{name}|{key}": whole(value)
        for name, parameter in learner.parameters.items()
        for key, value in state.get(parameter, {}).items()
    }


def restore_optimiser(learner: Learner, tensors: Mapping[str, Tensor]) -> None:
    """Undoes `optimiser_tensors`."""
    for full_name, tensor in tensors.items():
        name, key = full_name.rsplit("|", 1)
        parameter = learner.parameters[name]
        value = _step_count(tensor, learner, parameter) if key == "step" else placed_like(tensor, parameter)
        learner.optimiser.state[parameter][key] = value


def _step_count(tensor: Tensor, learner: Learner, parameter: nn.Parameter) -> Tensor:
    """AdamW's own count: with the parameter in the fused form, on the CPU otherwise; never sharded."""
    fused = learner.optimiser.param_groups[0]["fused"]
    return tensor.to(parameter.device if fused else "cpu", copy=True)


@torch.no_grad()
def copy_into(targets: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Overwrites tensors by name, where they are and in the layout that they have."""
    for name, tensor in tensors.items():
        targets[name].copy_(placed_like(tensor, targets[name]))


def whole(tensor: Tensor) -> Tensor:
    """A tensor in one piece. Collective where it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def placed_like(tensor: Tensor, other: Tensor) -> Tensor:
    """A whole tensor on the device of another, and sharded as it is; in memory of its own."""
    if isinstance(other, DTensor):
        return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements)
    return tensor.to(other.device, copy=True)
