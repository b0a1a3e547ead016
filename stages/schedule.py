"""The noise schedule: a scaled-linear DDIM variant with one timestep per frame (specification, section 9).

Called by `stages.window`. Frames are on the first axis of every tensor.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from stages.config import WindowConfig

NUM_TRAIN_TIMESTEPS = 1000


def signal_fractions(config: WindowConfig) -> Tensor:
    """(1000,) cumulative products of 1 - beta: the share of signal variance left at each timestep."""
    roots = torch.linspace(config.beta_start**0.5, config.beta_end**0.5, NUM_TRAIN_TIMESTEPS, dtype=torch.float32)
    return torch.cumprod(1 - roots**2, dim=0)


def frame_fractions(config: WindowConfig, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """((num_frames,), (num_frames,)): each window frame's signal fraction now and one level lower (clean: 1)."""
    levels = signal_fractions(config)[list(config.timesteps)]
    lower = torch.cat([torch.ones(1), levels[:-1]])
    now, then = (part.repeat_interleave(config.chunk_frames).to(device) for part in (levels, lower))
    return now, then


def frame_timesteps(config: WindowConfig, device: torch.device | str = "cpu") -> Tensor:
    """(num_frames,) timesteps of the window's frames, the cleanest chunk first."""
    return torch.tensor(config.timesteps, device=device).repeat_interleave(config.chunk_frames)


def add_noise(clean: Tensor, noise: Tensor, fractions: Tensor) -> Tensor:
    """Brings clean latents (n, c, h, w) to the noise levels given by signal fractions (n,) or (1,)."""
    signal = rearrange(fractions.to(clean.dtype), "n -> n 1 1 1")
    return signal.sqrt() * clean + (1 - signal).sqrt() * noise


def clean_latents(prediction: Tensor, latents: Tensor, signal: Tensor, kind: str) -> Tensor:
    """The clean latents that a prediction of `kind` ("epsilon" or "sample") means for latents of a signal fraction, any
    shapes that broadcast."""
    return prediction if kind == "sample" else (latents - (1 - signal).sqrt() * prediction) / signal.sqrt()


def step(prediction: Tensor, latents: Tensor, now: Tensor, then: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """One deterministic step per frame, from signal fraction `now` (n,) to `then` (n,).

    prediction and latents are (n, c, h, w); `kind` says what the network predicted: "epsilon" (the noise) or "sample"
    (the clean latents). Returns (latents one level lower, clean latents). Where `then` is 1 the two are equal.
    """
    now, then = (rearrange(part, "n -> n 1 1 1") for part in (now, then))
    clean = clean_latents(prediction, latents, now, kind)
    noise = prediction if kind == "epsilon" else (latents - now.sqrt() * prediction) / (1 - now).sqrt()
    return then.sqrt() * clean + (1 - then).sqrt() * noise, clean
