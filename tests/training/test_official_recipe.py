"""The official recipe: built at full size without memory, and one real step of each phase at reduced width."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from stages.config import (
    ImageEncoderConfig,
    KeypointConfig,
    ModelConfig,
    MotionEncoderConfig,
    PoseGuiderConfig,
    UNetConfig,
    VaeConfig,
)
from stages.weights import NETWORKS
from training.clips import Batch
from training.critic import Critic
from training.handover import load_networks
from training.phases.build import build_phase, networks_of
from training.phases.phase import draws
from training.recipes import Recipe, official

PICTURES = {"motion": 2, "distill": 2, "stream": 21}
"""Reference and targets of a sample; a stream needs at least the window's sixteen."""


def narrow_model() -> ModelConfig:
    """The official model's shape, four resolutions and all, in 64x64 pictures and few channels."""
    return ModelConfig(
        size_px=64,
        unet=UNetConfig(block_channels=(8, 12, 16, 16), num_heads=2, cross_attention_dim=12, num_norm_groups=4,
                        num_motion_heads=2, num_temporal_heads=2),
        motion_encoder=MotionEncoderConfig(
            crop_px=32, stem_channels=8, mid_channels=12, trunk_channels=16, num_landmarks=10, attention_dim=16,
            num_attention_heads=2, num_norm_groups=4, hourglass_depth=2, num_tokens=5, token_dim=12),
        keypoints=KeypointConfig(image_px=64, depths=(1, 1, 2, 1), dims=(8, 12, 16, 24), radius_px=1),
        pose_guider=PoseGuiderConfig(channels=(4, 6, 8, 10)),
        vae=VaeConfig(block_channels=(8, 8, 12, 12), layers_per_block=1, num_norm_groups=4),
        image_encoder=ImageEncoderConfig(
            image_px=32, patch_px=16, hidden_dim=16, intermediate_dim=24, num_layers=1, num_heads=2, projection_dim=12),
    )  # fmt: skip


def narrow_recipe() -> Recipe:
    recipe = official()
    stream = dataclasses.replace(recipe.stream, critic_channels=8)
    distill = dataclasses.replace(recipe.distill, critic_channels=8)
    return dataclasses.replace(recipe, model=narrow_model(), distill=distill, stream=stream)


def filmed_batch(num_pictures: int) -> Batch:
    """One sample of noise pictures with boxes and without truth."""
    rng = np.random.default_rng(0)
    parts = np.array([(8, 8, 56, 60), (18, 24, 28, 30), (36, 24, 46, 30), (24, 42, 40, 50)], np.int32)
    boxes = np.tile(parts, (1, num_pictures, 1, 1))
    nothing = np.full((1, num_pictures, 14), np.nan, np.float32), np.full((1, 21, 3), np.nan, np.float32)
    return Batch(rng.integers(0, 256, (1, num_pictures, 64, 64, 3), np.uint8), boxes, *nothing, np.zeros(1, np.int64))


def test_all_networks_and_the_discriminator_are_built_at_full_size():
    with torch.device("meta"):
        sizes = {name: sum(p.numel() for p in make(official().model).parameters()) for name, make in NETWORKS.items()}
        critic = Critic(512, official().distill.critic_channels)
    assert round(sizes["denoising_unet"] / 1e6) == 1663 and round(sizes["reference_unet"] / 1e6) == 835
    # The paper's discriminator is StyleGAN2's at 512x512, of some 29 million weights, here with time embeddings.
    assert 28e6 < sum(p.numel() for p in critic.parameters()) < 34e6


@pytest.mark.parametrize("name", PICTURES)
def test_one_real_step_at_reduced_width_moves_what_is_trained_and_nothing_else(name: str):
    recipe = narrow_recipe()
    networks = load_networks(networks_of(name), recipe.model, None, 0, True)
    phase = build_phase(name, recipe, networks, torch.device("cpu")).train()
    before = {key: value.clone() for key, value in phase.networks.named_parameters()}
    optimiser = torch.optim.AdamW([p for p in phase.networks.parameters() if p.requires_grad], lr=1e-3)
    update = phase(filmed_batch(PICTURES[name]), draws(0, 2, 0, 0), 5000, 0, None)
    update.loss.backward()
    optimiser.step()
    moved = {key for key, value in phase.networks.named_parameters() if not torch.equal(value, before[key])}
    assert torch.isfinite(update.loss)
    if name == "stream":
        assert moved and all(key.startswith("denoising_unet") and "temporal_modules" in key for key in moved)
    else:
        networks = {"denoising_unet", "reference_unet", "pose_guider", "motion_encoder"}
        assert {key.split(".")[0] for key in moved} == networks
        assert not any("temporal_modules" in key or "reference_unet.up_blocks.3" in key for key in moved)
