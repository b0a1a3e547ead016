"""Random numbers are a function of (seed, phase, step, rank)."""

from __future__ import annotations

import torch

from training.phases.phase import draws


def test_the_same_step_draws_the_same_numbers():
    first, second = (draws(3, 1, 70, 0) for _ in range(2))
    assert torch.equal(first.uniform(4), second.uniform(4))
    assert first.numpy.random() == second.numpy.random()


def test_seed_phase_step_and_rank_each_change_them():
    keys = [(3, 1, 70, 0), (4, 1, 70, 0), (3, 2, 70, 0), (3, 1, 71, 0), (3, 1, 70, 1)]
    assert len({float(draws(*key).uniform(1)) for key in keys}) == 5
    assert len({draws(*key).numpy.random() for key in keys}) == 5


def test_normal_numbers_take_shape_and_type_from_a_tensor():
    drawn = draws(0, 0, 0, 0).normal(torch.empty(2, 3, dtype=torch.bfloat16))
    assert drawn.shape == (2, 3) and drawn.dtype == torch.bfloat16
