"""Phases of the smoke recipe, built on fresh networks, and a few steps of learning."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from training.clips import Batch
from training.handover import load_networks
from training.phases.build import build_phase, networks_of
from training.phases.phase import Phase, draws
from training.recipes import Recipe, smoke

Build = Callable[..., Phase]
Learn = Callable[..., list[float]]


@pytest.fixture(scope="session")
def build() -> Build:
    """build("motion", drop_pose=1.0): the phase with fields of its config replaced."""

    def made(name: str, **fields: Any) -> Phase:
        recipe: Recipe = smoke()
        recipe = dataclasses.replace(recipe, **{name: dataclasses.replace(recipe.phase(name), **fields)})
        networks = load_networks(networks_of(name), recipe.model, None, 0, True)
        return build_phase(name, recipe, networks, torch.device("cpu")).train()

    return made


@pytest.fixture(scope="session")
def learn() -> Learn:
    """learn(phase, batch, num_steps): the losses of steps on one batch, always with the same random numbers."""

    def losses(phase: Phase, batch: Batch, num_steps: int, learning_rate: float = 2e-3) -> list[float]:
        optimiser = torch.optim.Adam([p for p in phase.parameters() if p.requires_grad], lr=learning_rate)
        found = []
        for _ in range(num_steps):
            loss = phase(batch, draws(0, 0, 0, 0), 0, 0, None).loss
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            found.append(float(loss))
        return found

    return losses
