"""Sliding training: the window goes over the clip as in inference, and every third one is learned from."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stages.errors import BadConfig
from training.augment import augment_run
from training.clips import Batch, Sampling
from training.phases.phase import draws

SAMPLING = Sampling(num_frames=10, kind="run")


def test_a_clip_gives_an_update_for_every_third_window(build):
    # Ten frames are five chunks of two: three windows of three chunks, of which the first is learned from.
    assert (build("stream", sampling=SAMPLING).num_windows, build("stream", sampling=SAMPLING).num_updates) == (3, 1)
    assert build("stream", sampling=SAMPLING, gradient_every=2).num_updates == 2
    assert build("stream", sampling=SAMPLING, sliding=False).num_updates == 1


def test_only_the_denoising_unet_learns(build):
    trained = {name.split(".")[0] for name, p in build("stream").networks.named_parameters() if p.requires_grad}
    assert trained == {"denoising_unet"}


@pytest.mark.parametrize("renoise", [True, False])
def test_the_window_slides_and_feeds_back_its_own_predictions(build, clip: Batch, renoise: bool):
    phase = build("stream", sampling=SAMPLING, gradient_every=2, renoise=renoise)
    draw = draws(0, 0, 0, 0)
    first = phase(clip, draw, 0, 0, None)
    second = phase(clip, draw, 0, 1, first.carry)
    assert (first.carry.position, second.carry.position) == (1, 3)
    assert first.fake.shape == (6, 3, 64, 64) and first.timesteps.tolist() == [0, 0, 500, 500, 999, 999]
    assert not second.carry.window.requires_grad and torch.isfinite(second.loss)


def test_a_learned_step_changes_what_the_next_window_sees_but_not_what_is_true(build, learn, clip: Batch):
    phase = build("stream", sampling=SAMPLING, gradient_every=2, adversarial_weight=0.0)
    before = phase(clip, draws(0, 0, 0, 0), 0, 0, None).carry
    learn(phase, clip, 1)
    after = phase(clip, draws(0, 0, 0, 0), 0, 0, None).carry
    assert torch.equal(before.scene.latents, after.scene.latents)
    assert not torch.equal(before.window, after.window)


def test_frames_of_a_clip_share_their_stretch(build):
    crops = np.random.default_rng(3).integers(0, 256, (2, 8, 12, 3), np.uint8)
    expected = augment_run(crops, np.random.default_rng(5), 0.5)
    assert np.array_equal(build("stream").augment(crops, np.random.default_rng(5), 0.5), expected)


def test_a_few_steps_reduce_the_loss(build, learn, clip: Batch):
    losses = learn(build("stream", sampling=SAMPLING, adversarial_weight=0.0), clip, 12)
    assert losses[-1] < 0.97 * losses[0]


def test_a_clip_shorter_than_a_window_is_refused(build, clip: Batch):
    short = Batch(clip.pixels[:, :5], clip.boxes[:, :5], clip.motions[:, :5], clip.canonical, clip.clips)
    with pytest.raises(BadConfig, match="at least"):
        build("stream", sampling=Sampling(num_frames=6, kind="run"))(short, draws(0, 0, 0, 0), 0, 0, None)
