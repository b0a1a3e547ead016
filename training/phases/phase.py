"""What a phase is to the engine (`training.engine`), and where its random numbers come from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stages.config import ModelConfig
from training.clips import Batch


@dataclass(frozen=True)
class Draws:
    """The random numbers of one step of one worker: a pure function of (seed, phase, step, rank).

    Nothing has to be saved to go on exactly, and a GPU run draws the same numbers as a CPU run: everything is drawn on
    the CPU.
    """

    numpy: np.random.Generator
    torch: torch.Generator

    def normal(self, like: Tensor) -> Tensor:
        """Standard normal numbers, shaped and placed like a tensor."""
        return torch.randn(like.shape, generator=self.torch).to(like)

    def uniform(self, *shape: int) -> Tensor:
        """Numbers in [0, 1)."""
        return torch.rand(shape, generator=self.torch)


def draws(seed: int, phase: int, step: int, rank: int) -> Draws:
    """The random numbers of a step."""
    key = np.random.SeedSequence([seed, phase, step, rank]).generate_state(2, np.uint64)
    generator = torch.Generator().manual_seed(int(key[1] >> np.uint64(1)))
    return Draws(np.random.default_rng(int(key[0])), generator)


@dataclass(frozen=True)
class Update:
    """What one forward pass of a phase says."""

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)
    """Detached scalars for the curves."""
    carry: Any = None
    """Handed to the next update of the same batch (detached)."""
    real: Tensor | None = None
    """(n, 3, h, w) pictures that a discriminator shall tell from `fake`; both detached."""
    fake: Tensor | None = None
    timesteps: Tensor | None = None
    """(n,) noise level of each of them."""


class Phase(nn.Module):
    """Networks and the loss that trains some of them. A subclass sets `num_updates` and implements `forward`.

    Trained parameters are those that require gradients. Networks live in `networks` under the names of the weights
    folder, so that what a phase hands on can be saved by name; a phase that only needs some holds only those.
    """

    num_updates: int = 1
    """Optimiser steps per batch."""

    def __init__(self, model: ModelConfig, networks: dict[str, nn.Module]):
        super().__init__()
        self.model = model
        self.networks = nn.ModuleDict(networks)
        self.critic: nn.Module | None = None

    def forward(self, batch: Batch, draw: Draws, step: int, index: int, carry: Any) -> Update:
        """The loss of update `index` (0 to num_updates - 1) of step `step`; `carry` is what the last update left."""
        raise NotImplementedError

    def finished(self) -> ModelConfig:
        """The model's config after the phase, where training measures a part of it (the autoencoder's scale)."""
        return self.model
