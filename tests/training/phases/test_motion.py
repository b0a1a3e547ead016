"""Single frames are learned from noise, the portrait and the motion."""

from __future__ import annotations

import pytest

from training.clips import Batch
from training.phases.phase import draws


def test_a_few_steps_reduce_the_loss(build, learn, batch: Batch):
    losses = learn(build("motion", drop_reference=0.0, drop_pose=0.0, drop_motion=0.0), batch, 15)
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("target", ["sample", "epsilon"])
def test_a_perfect_answer_costs_nothing_whatever_is_compared(build, batch: Batch, target: str):
    phase = build("motion", target=target, absolute_weight=0.0)
    scene = phase.scene(batch, draws(0, 0, 0, 0))
    phase.denoiser.forward = lambda *_: scene.latents
    assert float(phase(batch, draws(0, 0, 0, 0), 0, 0, None).loss) < 1e-6


def test_timesteps_are_all_or_only_the_windows_own(build):
    every, few = build("motion", timesteps="all"), build("motion", timesteps="levels")
    assert set(few._timesteps((2, 100), draws(0, 0, 0, 0)).flatten().tolist()) == {0, 500, 999}
    first, second = every._timesteps((2, 100), draws(0, 0, 0, 0)).tolist()
    assert len({*first, *second}) > 100 and first != second


def test_level_shares_decide_how_often_a_level_is_drawn(build):
    drawn = build("motion", level_shares=(0.0, 0.1, 0.9))._timesteps((3, 100), draws(0, 0, 0, 0))
    assert (drawn == 0).sum() == 0 and (drawn == 999).sum() > 200


def test_every_trained_network_gets_a_gradient_once_the_answer_is_not_the_bases_alone(build, learn, batch: Batch):
    phase = build("motion", drop_reference=0.0, drop_pose=0.0, drop_motion=0.0)
    learn(phase, batch, 1)
    phase(batch, draws(0, 0, 0, 0), 0, 0, None).loss.backward()
    touched = {name.split(".")[1] for name, p in phase.named_parameters() if p.grad is not None and p.grad.any()}
    assert touched == {"reference_unet", "denoising_unet", "pose_guider", "motion_encoder"}
