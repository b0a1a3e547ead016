"""The shared loop: warm-up and decay, an end in steps or time, and files that are whole."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from training.loop import learning_rate, load, save, timed_steps, train


def test_the_learning_rate_warms_up_and_decays_to_two_percent():
    rates = [learning_rate(1.0, spent, index=1000) for spent in (0.0, 0.5, 1.0)]
    assert rates[0] == 1.0 and 0.5 < rates[1] < 0.52 and abs(rates[2] - 0.02) < 1e-9
    assert learning_rate(1.0, 0.0, index=0) < 0.05


def test_a_loop_ends_after_its_steps_or_its_time():
    assert [index for index, _ in timed_steps(10.0, "steps", num_steps=4)] == [0, 1, 2, 3]
    assert list(timed_steps(0.0, "no time")) == []


def test_training_moves_towards_the_minimum():
    parameter = nn.Parameter(torch.tensor([4.0]))
    losses = train("line", [parameter], lambda index, spent: (parameter - 1).square().sum(), 1.0, 0.2, num_steps=120)
    assert losses[-1] < 0.05 * losses[0]


def test_saved_weights_come_back_and_are_readable_by_everybody(tmp_path: Path):
    torch.manual_seed(0)
    module, path = nn.Linear(3, 5), tmp_path / "deep" / "line.safetensors"
    save(module, path)
    twin = load(nn.Linear(3, 5), path)
    assert torch.equal(twin.weight, module.weight)
    assert path.stat().st_mode & 0o044 == 0o044
    assert [entry.name for entry in path.parent.iterdir()] == ["line.safetensors"]
