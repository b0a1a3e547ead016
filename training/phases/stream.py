"""Phase `stream`: sliding training of the temporal modules (paper, section 3.3, algorithm 2; specification, 4.2).

A window slides over a clip exactly as in inference, feeding back what the model itself predicted; every third window is
learned from, by the losses of phase `distill` over all its frames. Only the denoising UNet is trained, so what the
other networks say of the clip is computed once, in the clip's first update, and carried to the next.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from einops import rearrange, repeat
from torch import Tensor

from stages.config import WindowConfig
from stages.errors import BadConfig
from stages.schedule import add_noise, frame_fractions, frame_timesteps
from training.augment import augment_run
from training.clips import Batch
from training.phases.animation import Scene, resampled
from training.phases.distill import AppearancePhase
from training.phases.phase import Draws, Update
from training.recipes import StreamConfig


@dataclass(frozen=True)
class Slide:
    """Where a sliding window is, between two updates of a clip."""

    scene: Scene
    window: Tensor
    """(b, num_frames, c, h, w) latents, the cleanest chunk first."""
    position: int
    """Windows done so far."""


class StreamPhase(AppearancePhase):
    """Clips of consecutive frames."""

    config: StreamConfig
    augment = staticmethod(augment_run)

    @property
    def num_windows(self) -> int:
        """Windows of a clip."""
        return windows_per_clip(self.config, self.model.window)

    @property
    def num_updates(self) -> int:  # type: ignore[override]
        return updates_per_clip(self.config, self.model.window)

    def forward(self, batch: Batch, draw: Draws, step: int, index: int, carry: Slide | None) -> Update:
        slide = carry or self._begin(batch, draw)
        while slide.position % self.config.gradient_every:
            with torch.no_grad():
                slide, _ = self._slide(slide, draw)
        slide, clean = self._slide(slide, draw)
        shown = self._shown(slide.scene, slide.position - 1)
        timesteps = frame_timesteps(self.model.window, self.device)
        slide = replace(slide, window=slide.window.detach())
        return self.appearance(clean, shown, timesteps, step, slide)

    def _begin(self, batch: Batch, draw: Draws) -> Slide:
        """The first window: true latents, noised to their levels, and pure noise for the last chunk."""
        config = self.model.window
        if batch.pixels.shape[1] - 1 < config.num_frames:
            raise BadConfig(f"stream.sampling.num_frames must be at least the window's {config.num_frames}")
        with torch.no_grad():
            scene = self.scene(batch, draw)
            inside = scene.latents[:, : config.num_transition_frames]
            if self.config.portrait_start:
                inside = repeat(scene.portraits, "b c h w -> b f c h w", f=config.num_transition_frames)
            noisy = noised(config, inside, draw.normal(inside), slice(None, config.num_transition_frames))
            window = torch.cat([noisy, self._entering(scene, draw)], 1)
        return Slide(scene, window, 0)

    def _entering(self, scene: Scene, draw: Draws) -> Tensor:
        """(b, chunk_frames, c, h, w): what a new chunk enters as."""
        start = repeat(scene.portraits, "b c h w -> b f c h w", f=self.model.window.chunk_frames)
        noise = draw.normal(start)
        if not self.config.portrait_start:
            return noise
        return noised(self.model.window, start, noise, slice(self.model.window.num_transition_frames, None))

    def _shown(self, scene: Scene, position: int) -> Scene:
        first = position * self.model.window.chunk_frames
        return resampled(scene, slice(first, first + self.model.window.num_frames))

    def _slide(self, slide: Slide, draw: Draws) -> tuple[Slide, Tensor]:
        """One denoiser call: the next window, and the clean latents that this one predicted (with gradients)."""
        config, shown = self.model.window, self._shown(slide.scene, slide.position)
        timesteps = frame_timesteps(config, self.device)
        answer = self.denoiser(slide.window, timesteps, shown.motion, shown.pose, shown.memories).float()
        now, _ = (rearrange(part, "f -> f 1 1 1") for part in frame_fractions(config, self.device))
        clean = self.clean(answer, slide.window, now)
        kept = clean.detach()[:, config.chunk_frames :]
        if self.config.renoise:
            noise = draw.normal(kept)
        else:
            noise = ((slide.window - now.sqrt() * clean.detach()) / (1 - now).sqrt())[:, config.chunk_frames :]
        lower = noised(config, kept, noise, slice(None, config.num_transition_frames))
        window = torch.cat([lower, self._entering(slide.scene, draw)], 1)
        return Slide(slide.scene, window, slide.position + 1), clean


def windows_per_clip(config: StreamConfig, window: WindowConfig) -> int:
    """Windows of a clip."""
    return config.sampling.num_frames // window.chunk_frames - window.num_levels + 1 if config.sliding else 1


def updates_per_clip(config: StreamConfig, window: WindowConfig) -> int:
    """Optimiser steps of a clip: every `gradient_every`-th window, from the first on."""
    return -(-windows_per_clip(config, window) // config.gradient_every)


def noised(config: WindowConfig, latents: Tensor, noise: Tensor, frames: slice) -> Tensor:
    """Clean latents (b, f, c, h, w) at the noise levels of those frames of a window."""
    fractions = frame_fractions(config, latents.device)[0][frames]
    return torch.stack([add_noise(*parts, fractions) for parts in zip(latents, noise, strict=True)])
