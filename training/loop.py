"""What every phase shares: a timed loop with a progress bar, and saving networks. Called by the phases."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm


def timed_steps(minutes: float, name: str, num_steps: int | None = None) -> Iterator[tuple[int, float]]:
    """Step numbers and the share of the time that is gone (0 to 1), until `minutes` are over or `num_steps` done."""
    start, index = time.monotonic(), 0
    with tqdm(desc=name, unit="step") as bar:
        while True:
            gone_s = time.monotonic() - start
            if gone_s >= 60 * minutes or index == num_steps:
                return
            yield index, gone_s / (60 * minutes)
            index += 1
            bar.update()


def learning_rate(peak: float, spent: float, index: int, num_warmup: int = 50) -> float:
    """Linear warm-up, then a half cosine down to 2 % at the end of the time."""
    return peak * min(1.0, (index + 1) / num_warmup) * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * spent)))


def train(
    name: str,
    parameters: list[nn.Parameter],
    loss_of: Callable[[int, float], Tensor],
    minutes: float,
    peak: float,
    num_steps: int | None = None,
    bfloat16: bool = True,
) -> list[float]:
    """Runs AdamW on `loss_of(step, share of the time gone)`, by default in bfloat16 autocast; returns all losses."""
    optimiser = torch.optim.AdamW(parameters, lr=peak, betas=(0.9, 0.99), weight_decay=0.01)
    losses: list[float] = []
    for index, spent in timed_steps(minutes, name, num_steps):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(peak, spent, index)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16):
            loss = loss_of(index, spent)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        losses.append(loss.item())
        if index % 100 == 99:
            tqdm.write(f"{name} step {index + 1} loss {sum(losses[-100:]) / 100:.4f}")
    return losses


def save(module: nn.Module, path: Path) -> None:
    """Weights as safetensors, replaced in one move so that readers never see half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    save_file({key: value.detach().contiguous() for key, value in module.state_dict().items()}, partial)
    partial.chmod(0o644)
    partial.rename(path)


def load(module: nn.Module, path: Path) -> nn.Module:
    """Weights into `module`, which is returned."""
    module.load_state_dict(load_file(path))
    return module
