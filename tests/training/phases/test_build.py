"""Every phase gets its networks, placed where training had better start."""

from __future__ import annotations

import pytest
import torch

from stages.networks.vae import Vae
from training.phases.build import networks_of, start_fresh
from training.phases.phase import Phase
from training.recipes import PHASES, smoke_model


@pytest.mark.parametrize("name", PHASES)
def test_a_phase_holds_the_networks_that_it_names(build, name: str):
    phase: Phase = build(name)
    assert tuple(phase.networks) == networks_of(name)
    assert (phase.critic is not None) == (name in ("distill", "stream"))


def test_a_fresh_vae_starts_as_a_linear_code_that_is_always_the_same():
    first, second = (start_fresh("vae", Vae(smoke_model().vae), smoke_model()) for _ in range(2))
    assert torch.equal(first.encoder.conv_in.weight, second.encoder.conv_in.weight)
    assert not first.decoder.mid_block.resnets[0].conv2.weight.any()
