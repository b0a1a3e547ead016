"""The autoencoder starts as the best linear code, improves, and hands on latents of deviation 1."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from einops import rearrange

from stages.images import signed
from stages.networks.vae import Vae
from training.clips import Batch
from training.phases.autoencoder import (
    principal_components,
    recoloured,
    reconstruction_loss,
    start_as_components,
    through_middle,
)
from training.phases.phase import draws
from training.recipes import smoke_model


def frames(batch: Batch) -> np.ndarray:
    return rearrange(batch.pixels, "b f h w c -> (b f) h w c")


def test_a_fresh_vae_is_already_the_best_linear_code_of_its_pictures(batch: Batch):
    torch.manual_seed(0)
    vae, images = Vae(smoke_model().vae), signed(frames(batch))
    before = (vae.decode(vae.encode(images)) - images).square().mean()
    start_as_components(vae, frames(batch))
    with torch.inference_mode():
        after = (vae.decode(vae.encode(images)) - images).square().mean()
    # The error of a truncated basis is what its missing components hold; a flat picture's is its variance.
    assert after < 0.15 * images.var() < before


def test_components_are_orthonormal_and_ordered_by_what_they_hold():
    cells = torch.randn(40, 5, 3, 3, generator=torch.Generator().manual_seed(1))
    cells *= torch.tensor([3.0, 1.0, 0.1, 0.5, 2.0])[:, None, None]
    mean, components = principal_components(cells, 3)
    assert torch.allclose(components @ components.T, torch.eye(3), atol=1e-5)
    assert components.abs().argmax(1).tolist() == [0, 4, 1] and mean.shape == (5,)


def test_a_convolution_through_its_middle_maps_each_cell_alone():
    conv, matrix = torch.nn.Conv2d(4, 3, 3, padding=1), torch.arange(8.0).reshape(2, 4)
    with torch.no_grad():
        through_middle(conv, matrix, torch.tensor([1.0, 2.0]))
    x = torch.randn(1, 4, 2, 5)
    expected = torch.einsum("oc,nchw->nohw", matrix, x) + torch.tensor([1.0, 2.0])[:, None, None]
    assert torch.allclose(conv(x)[:, :2], expected, atol=1e-5) and not conv(x)[:, 2].any()


def test_a_few_steps_reduce_the_loss(build, learn, batch: Batch):
    losses = learn(build("autoencoder"), batch, 12, 2e-4)
    assert losses[-1] < losses[0]


def test_latents_of_the_finished_model_have_deviation_one(build, batch: Batch):
    phase, images = build("autoencoder"), signed(frames(batch))
    vae = phase.networks["vae"]
    latents = vae.moments(images)[0].detach()
    for _ in range(800):
        phase._follow(latents)
    finished = Vae(phase.finished().vae)
    finished.load_state_dict(vae.state_dict())
    assert float(finished.encode(images).std()) == pytest.approx(1, rel=0.01)


def test_edges_count_beside_pixels():
    target, weight = torch.zeros(1, 3, 4, 4), torch.ones(1, 1, 4, 4)
    flat, edged = target + 0.5, target.clone()
    edged[..., ::2] = 1.0
    assert reconstruction_loss(edged, target, weight, 0.0) == reconstruction_loss(flat, target, weight, 0.0)
    assert reconstruction_loss(edged, target, weight, 1.0) > reconstruction_loss(flat, target, weight, 1.0)


def test_recolouring_keeps_shape_and_range():
    images = torch.rand(4, 3, 8, 8) * 2 - 1
    changed = [recoloured(images, draws(0, 0, step, 0)) for step in range(12)]
    assert all(image.shape == images.shape and image.abs().max() <= 1 for image in changed)
    assert not all(torch.equal(image, images) for image in changed)
