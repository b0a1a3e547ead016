"""Phase `autoencoder`: pictures to latents and back, for models that start from nothing.

Latents are disturbed before they are decoded, since the denoiser's will be; and they are kept near deviation 1, so the
decoder sees the same disturbance throughout.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from stages.config import ModelConfig
from stages.images import signed
from stages.networks.layers import ResnetBlock
from stages.networks.vae import Vae, fold
from training.clips import Batch
from training.phases.phase import Draws, Phase, Update
from training.recipes import AutoencoderConfig
from training.regions import place_weights

LATENT_WEIGHT = 1e-3
DEVIATION_DECAY = 0.99


class AutoencoderPhase(Phase):
    """Trains `vae` on all frames of a batch, references included."""

    deviation: Tensor

    def __init__(self, model: ModelConfig, config: AutoencoderConfig, networks: dict[str, nn.Module]):
        super().__init__(model, networks)
        self.config = config
        self.register_buffer("deviation", torch.ones(()))

    def forward(self, batch: Batch, draw: Draws, step: int, index: int, carry: Any) -> Update:
        vae = self.networks["vae"]
        assert isinstance(vae, Vae)
        images = recoloured(signed(rearrange(batch.pixels, "b f h w c -> (b f) h w c")), draw)
        images = images.to(self.deviation.device)
        parts = torch.from_numpy(rearrange(batch.boxes[:, :, 1:], "b f k c -> (b f) k c")).to(images.device)
        weight = 1 + self.config.parts_weight * place_weights(parts, images.shape[-1])
        mean, _ = vae.moments(images)
        noisy = mean + self.config.latent_noise * draw.normal(mean)
        decoded = vae.decode(noisy * vae.config.scaling_factor).float()
        loss = reconstruction_loss(decoded, images, weight, self.config.gradient_weight)
        self._follow(mean)
        error = F.mse_loss(decoded.detach(), images)
        metrics = {"psnr_db": 10 * torch.log10(4 / error), "deviation": self.deviation.clone()}
        return Update(loss + LATENT_WEIGHT * mean.float().square().mean(), metrics)

    @torch.no_grad()
    def _follow(self, mean: Tensor) -> None:
        self.deviation.mul_(DEVIATION_DECAY).add_((1 - DEVIATION_DECAY) * mean.detach().float().std())

    def finished(self) -> ModelConfig:
        """With the scaling factor that gives latents deviation 1."""
        vae = dataclasses.replace(self.model.vae, scaling_factor=round(1 / float(self.deviation), 5))
        return dataclasses.replace(self.model, vae=vae)


def reconstruction_loss(decoded: Tensor, target: Tensor, weight: Tensor, gradient_weight: float) -> Tensor:
    """L1 of pixels plus L1 of their differences along rows and columns; all (n, 3, h, w), `weight` (n, 1, h, w)."""
    error = decoded - target
    across = (error.diff(dim=-1) * weight[..., 1:]).abs().mean()
    down = (error.diff(dim=-2) * weight[..., 1:, :]).abs().mean()
    return (error * weight).abs().mean() + gradient_weight * (across + down)


def recoloured(images: Tensor, draw: Draws) -> Tensor:
    """Random channel order and gain, so that latents do not know one set of palettes by heart."""
    rng = draw.numpy
    if rng.random() < 0.3:
        images = images[:, rng.permutation(3).tolist()]
    if rng.random() < 0.4:
        gain = torch.from_numpy(rng.uniform(0.6, 1.2, (len(images), 3, 1, 1)).astype(np.float32))
        images = ((images + 1) * gain - 1).clamp(-1, 1)
    return images.contiguous()


def start_as_components(vae: Vae, pixels: NDArray[np.uint8]) -> None:
    """Makes a fresh one-resolution VAE the best linear code of pictures (n, s, s, 3), in place.

    Latents are then the first principal components of the `pixel_patch` squares, all residual blocks answer zero, and
    training only has to add what a linear code cannot say. Needs `plain_output` and a single entry in `block_channels`,
    at least as many as latent channels.
    """
    config = vae.config
    mean, components = principal_components(fold(signed(pixels), config.pixel_patch), config.latent_channels)
    with torch.no_grad():
        for module in vae.modules():
            if isinstance(module, ResnetBlock):
                nn.init.zeros_(module.conv2.weight)
                nn.init.zeros_(module.conv2.get_parameter("bias"))
        through_middle(vae.encoder.conv_in, components, -components @ mean)
        through_middle(vae.encoder.conv_out, torch.eye(2 * config.latent_channels, config.block_channels[0]))
        through_middle(vae.quant_conv, torch.eye(2 * config.latent_channels))
        through_middle(vae.post_quant_conv, torch.eye(config.latent_channels))
        through_middle(vae.decoder.conv_in, torch.eye(config.block_channels[0], config.latent_channels))
        through_middle(vae.decoder.conv_out, components.T, mean)


def principal_components(folded: Tensor, num_components: int) -> tuple[Tensor, Tensor]:
    """Mean (c,) and leading components (num_components, c), orthonormal, of the cells of (n, c, h, w)."""
    cells = rearrange(folded, "n c h w -> (n h w) c").double()
    mean = cells.mean(0)
    _, vectors = torch.linalg.eigh((cells - mean).T @ (cells - mean))
    return mean.float(), vectors.flip(1)[:, :num_components].T.float()


def through_middle(conv: nn.Conv2d, matrix: Tensor, bias: Tensor | None = None) -> None:
    """Makes a convolution the linear map `matrix` (out, in) of each cell by itself; missing rows and columns are 0."""
    nn.init.zeros_(conv.weight)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    middle = conv.kernel_size[0] // 2
    conv.weight[: matrix.shape[0], : matrix.shape[1], middle, middle] = matrix
    if bias is not None:
        conv.bias[: len(bias)] = bias
