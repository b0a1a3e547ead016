"""The drawing networks learn, on single frames and on windows sliding as in inference."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stages.config import ModelConfig
from stages.networks.image_encoder import ImageEncoder
from stages.networks.motion_encoder import MotionEncoder
from stages.networks.pose_guider import PoseGuider
from stages.networks.unet import DenoisingUNet
from stages.networks.vae import Vae
from training.animation import (
    Animator,
    Encoded,
    direction_maps,
    encode_people,
    loss_weights,
    new_animator,
    posed,
    train_guider,
    train_still,
    train_stream,
    twin,
    without_temporal,
)
from training.samples import People


@pytest.fixture(scope="module")
def encoded(config: ModelConfig, people: People) -> Encoded:
    torch.manual_seed(0)
    vae, image_encoder = Vae(config.vae), ImageEncoder(config.image_encoder)
    guider = PoseGuider(config.pose_guider, config.unet.block_channels[0])
    return encode_people(config, vae, image_encoder, guider, people, seed=0)


def make_animator(config: ModelConfig) -> Animator:
    torch.manual_seed(0)
    guider = PoseGuider(config.pose_guider, config.unet.block_channels[0])
    return new_animator(config, guider, MotionEncoder(config.motion_encoder), seed=0)


def test_people_are_encoded_at_the_sizes_of_the_config(encoded: Encoded):
    assert encoded.latents.shape == (3, 11, 6, 4, 4)
    assert encoded.features.shape == (3, 11, 12, 4, 4)
    assert encoded.image_tokens.shape == (3, 11, 12)
    assert torch.allclose(encoded.weights.mean((2, 3, 4)), torch.ones(3, 11), atol=1e-5)


def test_new_temporal_modules_do_nothing(config: ModelConfig, encoded: Encoded):
    animator = make_animator(config)
    memory = animator.memory(encoded.latents[0, 0], encoded.image_tokens[0, 0])
    arguments = (
        encoded.latents[:1, :5],
        torch.tensor([0, 0, 500, 500, 999]),
        animator.tokens(encoded.expressions[:1, :5]),
        torch.zeros(1, 5, 8, 4, 4),
        [memory],
    )
    with torch.no_grad():
        full = animator.denoiser(*arguments)
        with without_temporal(animator.denoiser):
            skipped = animator.denoiser(*arguments)
    assert torch.allclose(full, skipped, atol=1e-5)


def test_temporal_modules_are_back_after_an_error(config: ModelConfig):
    denoiser = DenoisingUNet(config.unet, config.motion_encoder.token_dim)
    names = list(denoiser.state_dict())
    with pytest.raises(KeyError), without_temporal(denoiser):
        raise KeyError
    assert list(denoiser.state_dict()) == names


def test_a_few_steps_reduce_the_still_loss(config: ModelConfig, encoded: Encoded, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("training.animation.LEVEL_SHARES", (0.2, 0.3, 0.5))
    losses = train_still(make_animator(config), encoded, 1.0, seed=0, num_steps=30)
    assert np.mean(losses[-6:]) < 0.9 * np.mean(losses[:6])


def test_a_few_steps_reduce_the_stream_loss(config: ModelConfig, encoded: Encoded):
    losses = train_stream(make_animator(config), encoded, 1.0, seed=0, num_steps=24, peak=3e-3)
    assert np.mean(losses[-6:]) < 0.95 * np.mean(losses[:6])


def test_only_the_last_layer_of_the_guider_is_trained_with_the_denoiser(config: ModelConfig):
    trained = {name for name, value in make_animator(config).guider.named_parameters() if value.requires_grad}
    assert trained == {"conv_out_modify.weight", "conv_out_modify.bias"}


def test_the_guider_learns_where_keypoints_are(config: ModelConfig, people: People):
    _, losses = train_guider(config, people, 1.0, seed=0, num_steps=60)
    assert np.mean(losses[-10:]) < 0.9 * np.mean(losses[:10])


def test_direction_maps_peak_at_the_point_and_change_sign_there():
    maps = direction_maps(torch.tensor([[[0.25, -0.25]]]), 8)[0]
    assert maps.shape == (3, 8, 8)
    assert divmod(int(maps[0].argmax()), 8) in {(2, 4), (2, 5), (3, 4), (3, 5)}
    assert maps[1, 3, 2] > 0 > maps[1, 3, 7]


def test_loss_weights_are_largest_on_eyes_or_mouth(people: People):
    points = posed(people.canonical[:1], people.motions[0, :1])
    weight = loss_weights(points, 16)[0, 0]
    row, column = divmod(int(weight.argmax()), 16)
    places = (points[0, [3, 4, 5, 6], :2] * 0.5 + 0.5) * 16
    assert ((places - torch.tensor([column + 0.5, row + 0.5])).norm(dim=-1) < 3).any()


def test_a_twin_is_mirrored_in_pixels_and_in_motion(people: People):
    pixels, motions = twin(people.pixels[0], people.motions[0], np.random.default_rng(0))
    assert pixels.shape == people.pixels[0].shape
    assert np.allclose(motions[:, 1], -people.motions[0][:, 1])
    assert np.allclose(motions[:, 8], people.motions[0][:, 9])
