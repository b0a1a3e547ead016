"""Phase `autoencoder`: pictures to latents and back. Called by `training.quick`.

Most of the time goes to face-centred crops, where the detail is; the end to whole pictures, so that the group norms see
the statistics that inference has. Latents are disturbed before decoding, since the denoiser's will be.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stages.images import signed
from stages.messages import Pixels
from stages.networks.vae import Vae
from training.loop import train

LATENT_NOISE = 0.05
LATENT_WEIGHT = 1e-3
WHOLE_FROM = 0.6
"""Share of the time after which whole pictures are used instead of crops."""


def reconstruction_loss(decoded: Tensor, target: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    """L1 of pixels plus L1 of their gradients, (n, 3, h, w); `weight` (n, 1, h, w) favours places."""
    error = decoded - target
    across, down = error.diff(dim=-1), error.diff(dim=-2)
    if isinstance(weight, Tensor):
        across, down = across * weight[..., 1:], down * weight[..., 1:, :]
    return (error * weight).abs().mean() + across.abs().mean() + down.abs().mean()


def train_autoencoder(
    vae: Vae, pixels: Pixels, places: Tensor, minutes: float, seed: int, batch: int = 16, num_steps: int | None = None
) -> tuple[Vae, list[float]]:
    """Trains a VAE on uint8 pictures (n, s, s, 3); its `scaling_factor` is set so that latents have unit deviation.

    places (n, p, 2), in [-1, 1], are the eyes and the mouth, which weigh more in the loss.
    """
    torch.manual_seed(seed)
    config, rng = vae.config, np.random.default_rng(seed)

    def loss_of(index: int, spent: float) -> Tensor:
        whole = spent > WHOLE_FROM
        rows = rng.integers(len(pixels), size=batch // 4 if whole else batch)
        corner, side = ((0, 0), pixels.shape[1]) if whole else _corner(pixels.shape[1], rng)
        window = slice(corner[1], corner[1] + side), slice(corner[0], corner[0] + side)
        images = recolour(signed(np.stack([pixels[row][window] for row in rows])), rng)
        weight = place_weights(places[rows], pixels.shape[1])[:, :, window[0], window[1]]
        mean, _ = vae.moments(images)
        decoded = vae.decode((mean + LATENT_NOISE * torch.randn_like(mean)) * config.scaling_factor).float()
        return reconstruction_loss(decoded, images, weight) + LATENT_WEIGHT * mean.float().square().mean()

    losses = train("autoencoder", list(vae.parameters()), loss_of, minutes, 2e-3, num_steps)
    return rescaled(vae, pixels[:: max(len(pixels) // 64, 1)][:64]), losses


@torch.inference_mode()
def rescaled(vae: Vae, pixels: Pixels) -> Vae:
    """The same weights with the `scaling_factor` that gives these pictures' latents unit deviation."""
    deviation = float(vae.moments(signed(pixels))[0].std())
    scaled = Vae(dataclasses.replace(vae.config, scaling_factor=round(1 / deviation, 5)))
    scaled.load_state_dict(vae.state_dict())
    return scaled.requires_grad_(False).eval()


def recolour(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Random channel order and gain, so that the latents do not know the world's palettes by heart."""
    if rng.random() < 0.3:
        images = images[:, rng.permutation(3).tolist()]
    if rng.random() < 0.4:
        gain = torch.from_numpy(rng.uniform(0.6, 1.2, (len(images), 3, 1, 1)).astype(np.float32))
        images = ((images + 1) * gain - 1).clamp(-1, 1)
    return images.contiguous()


def place_weights(places: Tensor, size: int) -> Tensor:
    """(n, 1, size, size): 0.7 far from the places (n, p, 2), up to about 4 on them."""
    centres = (torch.arange(size) + 0.5) * 2 / size - 1
    x, y = ((places[:, :, axis : axis + 1] - centres) / 0.13 for axis in (0, 1))
    near = torch.exp(-0.5 * (x[:, :, None] ** 2 + y[..., None] ** 2)).sum(1, keepdim=True)
    return 0.7 + 3 * near


def _corner(size: int, rng: np.random.Generator) -> tuple[tuple[int, int], int]:
    """Left and top of a half-size crop, mostly around the face, and its side."""
    side = size // 2
    spread = side // 4 if rng.random() < 0.7 else side // 2
    x, y = (int(v) for v in np.clip(side // 2 + rng.integers(-spread, spread + 1, 2), 0, side))
    return (x, y), side


def freeze(module: nn.Module) -> nn.Module:
    """No gradients, inference statistics."""
    return module.requires_grad_(False).eval()


@torch.inference_mode()
def psnr(a: Tensor, b: Tensor, peak: float = 2.0) -> float:
    """Peak signal to noise ratio in dB of pictures whose values span `peak`."""
    return float(10 * torch.log10(peak**2 / F.mse_loss(a, b)))
