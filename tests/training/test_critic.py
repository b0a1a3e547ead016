"""The discriminator learns, knows the noise level, and sees generators that always answer alike."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from training.critic import Critic, with_deviation


def test_pictures_of_any_power_of_two_become_one_logit_each():
    torch.manual_seed(0)
    assert Critic(32, 12)(torch.randn(5, 3, 32, 32), torch.arange(5)).shape == (5,)


def test_a_new_discriminator_does_not_look_at_the_timestep_but_can_learn_to():
    torch.manual_seed(0)
    critic, pictures = Critic(16, 8), torch.randn(2, 3, 16, 16)
    early, late = (critic(pictures, torch.full((2,), step)) for step in (0, 999))
    assert torch.equal(early, late)
    early.sum().backward()
    assert all(block.time.weight.grad.abs().sum() > 0 for block in critic.blocks)


def test_a_few_steps_tell_noise_from_flat_pictures():
    torch.manual_seed(0)
    critic, timesteps = Critic(16, 8), torch.zeros(8, dtype=torch.long)
    optimiser = torch.optim.Adam(critic.parameters(), lr=2e-3)
    real, fake = torch.randn(8, 3, 16, 16) * 0.5, torch.zeros(8, 3, 16, 16)
    for _ in range(30):
        loss = (F.softplus(critic(fake, timesteps)) + F.softplus(-critic(real, timesteps))).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert critic(real, timesteps).mean() > critic(fake, timesteps).mean() + 1


def test_equal_pictures_have_no_deviation():
    alike = torch.ones(4, 2, 3, 3)
    assert with_deviation(alike)[:, 2].max() < 1e-3
    assert with_deviation(alike * torch.arange(4.0)[:, None, None, None])[:, 2].min() > 0.5
