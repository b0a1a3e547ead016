"""Few-step distillation: the last of a random number of own steps is learned from, by what its picture looks like."""

from __future__ import annotations

from dataclasses import replace

import torch
from einops import rearrange

from stages.networks.vae import Vae
from training.clips import Batch
from training.phases.phase import draws


def test_a_few_steps_reduce_the_loss(build, learn, batch: Batch):
    losses = learn(build("distill", adversarial_weight=0.0, drop_reference=0.0), batch, 12)
    assert losses[-1] < 0.95 * losses[0]


def test_every_level_is_learned_from_and_only_the_last_call_has_gradients(build, batch: Batch):
    phase = build("distill")
    calls: list[tuple[int, bool]] = []
    forward = phase.denoiser.forward

    def noted(latents, timesteps, *rest):
        calls.append((int(timesteps[0]), torch.is_grad_enabled()))
        return forward(latents, timesteps, *rest)

    phase.denoiser.forward = noted
    lasts = set()
    for step in range(24):
        calls.clear()
        phase(batch, draws(0, 0, step, 0), step, 0, None)
        assert [level for level, _ in calls] == [999, 500, 0][: len(calls)]
        assert [gradient for _, gradient in calls] == [False] * (len(calls) - 1) + [True]
        lasts.add(calls[-1][0])
    assert lasts == {0, 500, 999}


def test_pictures_for_the_discriminator_are_detached_and_know_their_level(build, batch: Batch):
    update = build("distill")(batch, draws(0, 0, 1, 0), 1, 0, None)
    assert update.fake.shape == update.real.shape == (10, 3, 64, 64)
    assert not update.fake.requires_grad and len(update.timesteps) == 10
    assert len(update.timesteps.unique()) == 1


def test_the_discriminator_is_heard_from_its_step_on(build, batch: Batch):
    phase = build("distill", adversarial_from_step=4)
    before, after = (phase(batch, draws(0, 0, 0, 0), step, 0, None).metrics for step in (3, 4))
    assert "adversarial" not in before and "adversarial" in after


def test_without_a_say_there_is_no_discriminator(build, batch: Batch):
    phase = build("distill", adversarial_weight=0.0)
    assert phase.critic is None
    assert phase(batch, draws(0, 0, 0, 0), 9, 0, None).fake is None


def test_decoded_pictures_have_the_detail_that_inference_gives_them(build, batch: Batch):
    plain, detailed = build("distill"), build("distill")
    plain.model = replace(plain.model, vae=replace(plain.model.vae, kept_detail=0.0))
    pictures = [phase(batch, draws(0, 0, 1, 0), 1, 0, None).fake for phase in (plain, detailed)]
    scene, vae = detailed.scene(batch, draws(0, 0, 1, 0)), detailed.network("vae", Vae)
    given = detailed.detail(rearrange(scene.moved, "b f c h w -> (b f) c h w"))
    torch.testing.assert_close(pictures[1] - pictures[0], given, rtol=0, atol=1e-5)
    # Detail of which everything is what coding takes: a second coding finds little of it.
    assert given.std() > 0.01 and vae.encode(given).std() < vae.encode(pictures[1]).std()


def test_pictures_that_are_decoded_again_for_their_gradients_give_the_same(build, batch: Batch):
    found = []
    for recompute in (False, True):
        phase = build("distill", recompute=recompute)
        # Before anything is learned the answer is the moved portrait alone.
        torch.nn.init.normal_(phase.denoiser.conv_out.weight, generator=torch.Generator().manual_seed(1))
        update = phase(batch, draws(0, 0, 0, 0), 0, 0, None)
        update.loss.backward()
        found.append((update.loss.detach(), phase.denoiser.conv_in.weight.grad))
    (loss, gradient), (loss_again, gradient_again) = found
    assert torch.allclose(loss, loss_again) and gradient.any()
    assert (gradient - gradient_again).norm() < 1e-4 * gradient.norm()
