"""A model of unequal, very small sizes, and two people drawn for it."""

from __future__ import annotations

import pytest

from stages.config import (
    ImageEncoderConfig,
    KeypointConfig,
    ModelConfig,
    MotionEncoderConfig,
    PoseGuiderConfig,
    UNetConfig,
    VaeConfig,
    WindowConfig,
)
from training.samples import People, draw_people

SIZE = 64


@pytest.fixture(scope="session")
def config() -> ModelConfig:
    """Two frames a chunk, three levels; 64x64 pictures and 4x4 latents of 6 channels."""
    return ModelConfig(
        name="smallest",
        size_px=SIZE,
        unet=UNetConfig(
            in_channels=6,
            block_channels=(8, 16),
            attention_levels=(True, False),
            layers_per_block=1,
            num_heads=2,
            cross_attention_dim=12,
            num_norm_groups=4,
            num_motion_heads=1,
            num_temporal_heads=4,
            max_positions=6,
        ),
        motion_encoder=MotionEncoderConfig(
            crop_px=32,
            stem_channels=8,
            mid_channels=12,
            trunk_channels=16,
            num_landmarks=10,
            attention_dim=16,
            num_attention_heads=2,
            num_norm_groups=4,
            hourglass_depth=2,
            num_tokens=5,
            token_dim=12,
        ),
        keypoints=KeypointConfig(image_px=64, depths=(1, 1, 2, 1), dims=(8, 12, 16, 24), radius_px=2),
        pose_guider=PoseGuiderConfig(channels=(4, 6, 8, 10, 12)),
        vae=VaeConfig(
            block_channels=(8, 16),
            layers_per_block=1,
            latent_channels=6,
            num_norm_groups=4,
            mid_attention=False,
            scaling_factor=0.8,
            pixel_patch=8,
        ),
        image_encoder=ImageEncoderConfig(
            image_px=32, patch_px=16, hidden_dim=16, intermediate_dim=24, num_layers=1, num_heads=2, projection_dim=12
        ),
        window=WindowConfig(chunk_frames=2, timesteps=(0, 500, 999), prediction="sample"),
    )


@pytest.fixture(scope="session")
def people() -> People:
    """Three people, a portrait and ten frames each."""
    return draw_people([21, 22, 23], "still", 11, SIZE)
