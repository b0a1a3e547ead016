"""KL autoencoder: pictures to latents and back. Called by the reference stage (encode) and the decode stage (decode).

The plain form (`pixel_patch` = `latent_patch` = 1) is Stable Diffusion's AutoencoderKL with its tensor names (spec
section 8). Folding squares of pixels into channels at the entry and exit leaves no convolution at full resolution,
which is what makes the tiny model fast. Feed contiguous NCHW: torch's CPU GroupNorm is inaccurate on channels-last.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from stages.config import VaeConfig
from stages.networks.layers import ResnetBlock, Upsample

NORM_EPS = 1e-6


class PixelAttention(nn.Module):
    """Single-head self-attention over all pixels: (n, c, h, w) to the same."""

    def __init__(self, channels: int, num_groups: int):
        super().__init__()
        self.group_norm = nn.GroupNorm(num_groups, channels, eps=NORM_EPS)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        tokens = rearrange(self.group_norm(x), "n c h w -> n 1 (h w) c")
        attended = F.scaled_dot_product_attention(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens))
        return x + rearrange(self.to_out[0](attended), "n 1 (h w) c -> n c h w", h=x.shape[2])


def _resnets(in_channels: int, out_channels: int, num_layers: int, num_groups: int) -> nn.ModuleList:
    widths = [in_channels] + [out_channels] * (num_layers - 1)
    return nn.ModuleList([ResnetBlock(width, out_channels, None, num_groups, NORM_EPS) for width in widths])


class MidBlock(nn.Module):
    """The lowest resolution: resnet, attention where configured, resnet."""

    def __init__(self, channels: int, num_groups: int, attention: bool):
        super().__init__()
        self.resnets = _resnets(channels, channels, 2, num_groups)
        self.attentions = nn.ModuleList([PixelAttention(channels, num_groups)] if attention else [])

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


class Downsample(nn.Module):
    """Halves the sides. Pads right and bottom only, unlike the UNets' symmetric padding."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class DownBlock(nn.Module):
    """Resnets at one resolution, then half of it unless `last`."""

    def __init__(self, in_channels: int, out_channels: int, config: VaeConfig, last: bool):
        super().__init__()
        self.resnets = _resnets(in_channels, out_channels, config.layers_per_block, config.num_norm_groups)
        self.downsamplers = nn.ModuleList([] if last else [Downsample(out_channels)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.resnets, *self.downsamplers):
            x = layer(x)
        return x


class UpBlock(nn.Module):
    """Resnets at one resolution, one more than on the way down, then twice the resolution unless `last`."""

    def __init__(self, in_channels: int, out_channels: int, config: VaeConfig, last: bool):
        super().__init__()
        self.resnets = _resnets(in_channels, out_channels, config.layers_per_block + 1, config.num_norm_groups)
        self.upsamplers = nn.ModuleList([] if last else [Upsample(out_channels)])

    def forward(self, x: Tensor) -> Tensor:
        for resnet in self.resnets:
            x = resnet(x)
        for upsample in self.upsamplers:
            x = upsample(x, (2 * x.shape[2], 2 * x.shape[3]))
        return x


def _output_norm(config: VaeConfig, width: int) -> nn.GroupNorm | None:
    return None if config.plain_output else nn.GroupNorm(config.num_norm_groups, width, eps=NORM_EPS)


class Encoder(nn.Module):
    """Folded pictures (n, 3·p², H/p, W/p) to 2·latent_channels moments at the lowest resolution."""

    def __init__(self, config: VaeConfig):
        super().__init__()
        widths = config.block_channels
        self.conv_in = nn.Conv2d(3 * config.pixel_patch**2, widths[0], 3, padding=1)
        inputs = (widths[0], *widths[:-1])
        self.down_blocks = nn.ModuleList(
            [DownBlock(inputs[i], width, config, last=i == len(widths) - 1) for i, width in enumerate(widths)]
        )
        self.mid_block = MidBlock(widths[-1], config.num_norm_groups, config.mid_attention)
        self.conv_norm_out = _output_norm(config, widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        x = self.mid_block(x)
        return self.conv_out(x if self.conv_norm_out is None else F.silu(self.conv_norm_out(x)))


class Decoder(nn.Module):
    """Unfolded latents (n, latent_channels, h, w) to folded pictures (n, 3·p², H/p, W/p)."""

    def __init__(self, config: VaeConfig):
        super().__init__()
        widths = config.block_channels[::-1]
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        inputs = (widths[0], *widths[:-1])
        self.mid_block = MidBlock(widths[0], config.num_norm_groups, config.mid_attention)
        self.up_blocks = nn.ModuleList(
            [UpBlock(inputs[i], width, config, last=i == len(widths) - 1) for i, width in enumerate(widths)]
        )
        self.conv_norm_out = _output_norm(config, widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 3 * config.pixel_patch**2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(x if self.conv_norm_out is None else F.silu(self.conv_norm_out(x)))


def fold(x: Tensor, patch: int) -> Tensor:
    """(n, c, h·p, w·p) to (n, c·p², h, w): each p x p square becomes channels, ordered as torch's pixel_unshuffle."""
    return rearrange(x, "n c (h p) (w q) -> n (c p q) h w", p=patch, q=patch)


def unfold(x: Tensor, patch: int) -> Tensor:
    """The inverse of `fold`."""
    return rearrange(x, "n (c p q) h w -> n c (h p) (w q)", p=patch, q=patch)


class Vae(nn.Module):
    """Pictures (n, 3, H, W) in [-1, 1] and latents (n, c, h, w); H is h · downscale, c latent_channels · latent_patch².

    H and W must be multiples of `config.downscale`. Nothing is sampled here: training draws from `moments` itself.
    """

    def __init__(self, config: VaeConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)
        self.decoder = Decoder(config)

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance, each (n, c, h, w), of the unscaled latent; the latter clamped to [-30, 20]."""
        encoded = self.quant_conv(self.encoder(fold(images, self.config.pixel_patch)))
        mean, logvar = (fold(half, self.config.latent_patch) for half in torch.chunk(encoded, 2, dim=1))
        return mean, logvar.clamp(-30.0, 20.0)

    def encode(self, images: Tensor) -> Tensor:
        """Latents as the denoiser sees them: the distribution's mean times `scaling_factor`, without sampling."""
        return self.moments(images)[0] * self.config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures in about [-1, 1] (not clamped) of latents as the denoiser sees them."""
        latents = unfold(latents / self.config.scaling_factor, self.config.latent_patch)
        return unfold(self.decoder(self.post_quant_conv(latents)), self.config.pixel_patch)

    def lost(self, images: Tensor) -> Tensor:
        """(n, 3, H, W) what coding takes from fp32 pictures in [-1, 1]: detail finer than latents hold."""
        # Halves of which little is left after a difference would be grains.
        return images - self.decode(self.encode(images.to(next(self.parameters())))).float()
