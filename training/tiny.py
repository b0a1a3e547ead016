"""Sizes of the tiny model: live at 256x256 on shared CPU cores. Called by `training.quick`."""

from __future__ import annotations

import dataclasses

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

KEYFRAME_THRESHOLD = 6.5
"""In the scale of `training.perception.token_map`: about two frames in a minute of talking lie further than this from
the portrait's motion and from each other."""


def tiny_config(scaling_factor: float = 1.0) -> ModelConfig:
    """The tiny model; the autoencoder's scaling factor is measured while it is trained."""
    return ModelConfig(
        name="tiny",
        licence="Apache-2.0",
        size_px=256,
        unet=UNetConfig(
            in_channels=32,
            block_channels=(32, 64),
            attention_levels=(True, True),
            layers_per_block=1,
            num_heads=1,
            cross_attention_dim=32,
            num_norm_groups=8,
            num_motion_heads=1,
            num_temporal_heads=1,
            max_positions=16,
        ),
        motion_encoder=MotionEncoderConfig(
            crop_px=64,
            stem_channels=16,
            mid_channels=24,
            trunk_channels=32,
            num_landmarks=24,
            attention_dim=64,
            num_attention_heads=4,
            num_norm_groups=8,
            hourglass_depth=2,
            num_tokens=16,
            token_dim=16,
        ),
        keypoints=KeypointConfig(image_px=128, depths=(1, 1, 3, 1), dims=(24, 48, 96, 192), radius_px=6),
        pose_guider=PoseGuiderConfig(channels=(4, 4, 8, 16, 32)),
        # Folding 8x8 squares at the entry leaves no convolution above 32x32: the cost of a frame is what counts here.
        vae=VaeConfig(
            block_channels=(64, 128),
            layers_per_block=1,
            latent_channels=32,
            num_norm_groups=16,
            mid_attention=False,
            scaling_factor=scaling_factor,
            pixel_patch=8,
        ),
        image_encoder=ImageEncoderConfig(
            image_px=64, patch_px=16, hidden_dim=48, intermediate_dim=96, num_layers=2, num_heads=4, projection_dim=32
        ),
        # A chunk enters as the portrait under moderate noise, so that a short training need not learn to draw
        # everything from attention alone; and the clean latent is predicted, since errors of predicted noise grow.
        window=WindowConfig(timesteps=(0, 60, 120, 180), prediction="sample", keyframe_threshold=KEYFRAME_THRESHOLD),
    )


def calmed(config: ModelConfig, factor: float = 0.05) -> ModelConfig:
    """The same model with `factor` times the noise variance per timestep, for inference after a short training.

    A denoiser this little trained hands noise on as flicker: a twentieth of the noise it was trained with cut the
    flicker of a still backdrop to a quarter, and the error did not grow (`stages/tiny/README.md`).
    """
    window = config.window
    calm = dataclasses.replace(window, beta_start=window.beta_start * factor, beta_end=window.beta_end * factor)
    return dataclasses.replace(config, window=calm)
