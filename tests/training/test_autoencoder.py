"""The autoencoder learns, and hands on latents of unit size."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stages.config import ModelConfig
from stages.images import signed
from stages.networks.vae import Vae
from training.autoencoder import place_weights, psnr, recolour, train_autoencoder
from training.quick import features_in, flat_pixels
from training.samples import People


def test_a_few_steps_reduce_the_loss_and_latents_have_unit_deviation(config: ModelConfig, people: People):
    torch.manual_seed(0)
    pixels = flat_pixels(people)
    vae, losses = train_autoencoder(Vae(config.vae), pixels, features_in(people), 1.0, seed=0, batch=8, num_steps=40)
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    assert float(vae.encode(signed(pixels)).std()) == pytest.approx(1.0, rel=0.02)
    assert not any(parameter.requires_grad for parameter in vae.parameters())


def test_the_loss_weighs_eyes_and_mouth_more():
    weight = place_weights(torch.tensor([[[0.5, -0.5]]]), 32)[0, 0]
    row, column = divmod(int(weight.argmax()), 32)
    assert (row, column) in {(7, 23), (7, 24), (8, 23), (8, 24)}
    assert weight[-1, 0] == pytest.approx(0.7, abs=1e-3) and weight.max() > 3


def test_recolouring_keeps_shape_and_range():
    images = torch.rand(4, 3, 8, 8) * 2 - 1
    changed = [recolour(images, np.random.default_rng(seed)) for seed in range(12)]
    assert all(image.shape == images.shape and image.abs().max() <= 1 for image in changed)
    assert not all(torch.equal(image, images) for image in changed)


def test_psnr_of_a_known_error():
    assert psnr(torch.zeros(10), torch.full((10,), 0.2)) == pytest.approx(20.0, abs=1e-4)
