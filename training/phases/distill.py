"""Phase `distill`: few-step appearance distillation (paper, section 3.2, algorithm 1; specification, section 3).

There is no teacher. The model runs a random number of its own steps, and the picture that it predicts in the last of
them is compared with the true one: squared error, perceptual distance, and a discriminator. Gradients flow through that
last call alone; a random number of steps supervises every level.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from stages.config import ModelConfig
from stages.networks.vae import Vae
from stages.schedule import clean_latents, signal_fractions
from training.clips import Batch
from training.phases.animation import AnimationPhase, Scene, image_loss, softness, without_temporal
from training.phases.phase import Draws, Update
from training.recipes import DistillConfig


class AppearancePhase(AnimationPhase):
    """Image losses of predicted latents; what `distill` and `stream` share."""

    config: DistillConfig

    def __init__(
        self,
        model: ModelConfig,
        config: DistillConfig,
        networks: dict[str, nn.Module],
        perceptual: nn.Module | None,
        critic: nn.Module | None,
    ):
        super().__init__(model, config, networks)
        self.perceptual = None if perceptual is None else perceptual.requires_grad_(False)
        self.critic = critic

    def signal(self, level: int) -> Tensor:
        """Share of signal at a level of the window."""
        return signal_fractions(self.model.window)[self.model.window.timesteps[level]].to(self.device)

    def clean(self, answer: Tensor, noisy: Tensor, signal: Tensor) -> Tensor:
        """The predicted clean latents, whatever the network's answer means."""
        return clean_latents(answer, noisy, signal, self.model.window.prediction)

    def appearance(self, latents: Tensor, scene: Scene, timesteps: Tensor, step: int, carry: Any = None) -> Update:
        """The loss of predicted latents (b, f, c, h, w), the frames' timesteps being (f,)."""
        num_samples = len(latents)
        decoded = self._decoded(rearrange(latents, "b f c h w -> (b f) c h w")).float()
        if self.model.vae.kept_detail:
            decoded = decoded + self.detail(rearrange(scene.moved, "b f c h w -> (b f) c h w"))
        target = rearrange(scene.images, "b f c h w -> (b f) c h w")
        face_boxes = rearrange(scene.boxes, "b f k c -> (b f) k c")
        pixel = image_loss(decoded, target, face_boxes, self.config.face_weight, self.config.parts_weight)
        metrics = {"pixel": pixel.detach(), "psnr_db": 10 * torch.log10(4 / F.mse_loss(decoded.detach(), target))}
        soft = softness(decoded, target)
        loss, metrics["softness"] = pixel + self.config.sharpness_weight * soft, soft.detach()
        if self.perceptual is not None:
            distance = self.perceptual(decoded, target).mean()
            loss, metrics["perceptual"] = loss + self.config.perceptual_weight * distance, distance.detach()
        if self.critic is None:
            return Update(loss, metrics, carry)
        levels = timesteps.repeat(num_samples)
        if step >= self.config.adversarial_from_step:
            fooled = F.softplus(-self.critic(decoded, levels)).mean()
            loss, metrics["adversarial"] = loss + self.config.adversarial_weight * fooled, fooled.detach()
        return Update(loss, metrics, carry, real=target, fake=decoded.detach(), timesteps=levels)

    @torch.no_grad()
    def detail(self, moved: Tensor) -> Tensor:
        """(n, 3, s, s) what decoded frames get of the moved portrait (n, 3, s, s) in [0, 1], as in `stages.decode`."""
        return self.model.vae.kept_detail * self.network("vae", Vae).lost(moved * 2 - 1)

    def _decoded(self, latents: Tensor) -> Tensor:
        """Pictures (n, 3, s, s) of latents (n, c, h, w)."""
        decode = self.network("vae", Vae).decode
        if not self.config.recompute:
            return decode(latents)
        return torch.cat([checkpoint(decode, one, use_reentrant=False) for one in latents.split(1)])


class DistillPhase(AppearancePhase):
    """Single frames, from noise down a random number of levels."""

    def forward(self, batch: Batch, draw: Draws, step: int, index: int, carry: Any) -> Update:
        scene = self.scene(batch, draw)
        num_levels = self.model.window.num_levels
        num_calls = int(draw.numpy.integers(1, num_levels + 1))
        latents = self._start(scene, draw)
        with without_temporal(self.denoiser):
            for level in range(num_levels - 1, num_levels - 1 - num_calls, -1):
                is_last = level == num_levels - num_calls
                with torch.set_grad_enabled(is_last and torch.is_grad_enabled()):
                    clean = self._call(scene, latents, level)
                if not is_last:
                    below = self.signal(level - 1)
                    latents = below.sqrt() * clean + (1 - below).sqrt() * draw.normal(clean)
        timesteps = self._timesteps(scene, num_levels - num_calls)
        return self.appearance(clean, scene, timesteps, step)

    def _start(self, scene: Scene, draw: Draws) -> Tensor:
        noise = draw.normal(scene.latents)
        if not self.config.portrait_start:
            return noise
        signal = self.signal(-1)
        return signal.sqrt() * scene.portraits[:, None] + (1 - signal).sqrt() * noise

    def _call(self, scene: Scene, latents: Tensor, level: int) -> Tensor:
        answer = self.denoiser(latents, self._timesteps(scene, level), scene.motion, scene.pose, scene.memories)
        return self.clean(answer.float(), latents, self.signal(level))

    def _timesteps(self, scene: Scene, level: int) -> Tensor:
        return torch.full((scene.latents.shape[1],), self.model.window.timesteps[level], device=self.device)
