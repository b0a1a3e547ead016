"""Phase `motion`: image-level training with hybrid motion signals (paper, section 3.1; specification, section 2).

Frames are independent of each other: the denoiser's temporal modules are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from stages.config import ModelConfig
from stages.schedule import clean_latents, signal_fractions
from training.clips import Batch
from training.phases.animation import AnimationPhase, without_temporal
from training.phases.phase import Draws, Update
from training.recipes import MotionConfig


class MotionPhase(AnimationPhase):
    """Predicts each target frame from its noised latent, the portrait and the hybrid motion signal."""

    config: MotionConfig

    def __init__(self, model: ModelConfig, config: MotionConfig, networks: dict[str, nn.Module]):
        super().__init__(model, config, networks)

    def forward(self, batch: Batch, draw: Draws, step: int, index: int, carry: Any) -> Update:
        scene = self.scene(batch, draw)
        timesteps = self._timesteps(scene.latents.shape[:2], draw).to(self.device)
        noise = draw.normal(scene.latents)
        noise = noise + self.config.noise_offset * draw.normal(scene.latents[..., :1, :1])
        signal = rearrange(signal_fractions(self.model.window).to(self.device)[timesteps], "b f -> b f 1 1 1")
        noisy = signal.sqrt() * scene.latents + (1 - signal).sqrt() * noise
        with without_temporal(self.denoiser):
            answer = self.denoiser(noisy, timesteps, scene.motion, scene.pose, scene.memories).float()
        clean = clean_latents(answer, noisy, signal, self.model.window.prediction)
        if self.config.target == "epsilon":
            error = (noisy - signal.sqrt() * clean) / (1 - signal).sqrt() - noise
        else:
            error = clean - scene.latents
        loss = (error.square() + self.config.absolute_weight * error.abs()) * scene.weights
        per_frame = (clean - scene.latents).detach().square().mean((2, 3, 4))
        noisiest = timesteps >= self.model.window.timesteps[-1]
        metrics = {"clean_error": per_frame.mean()}
        if noisiest.any():
            metrics["clean_error_noisiest"] = per_frame[noisiest].mean()
        return Update(loss.mean(), metrics)

    def _timesteps(self, shape: Sequence[int], draw: Draws) -> Tensor:
        """(b, f) one for each frame of each sample."""
        if self.config.timesteps == "all":
            return torch.from_numpy(draw.numpy.integers(0, 1000, shape))
        levels, shares = self.model.window.timesteps, self.config.level_shares or None
        return torch.from_numpy(draw.numpy.choice(levels, shape, p=shares))
