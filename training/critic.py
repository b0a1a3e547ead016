"""The discriminator of phases `distill` and `stream`: is a picture true or made, at which noise level was it made?

Written from the papers: the residual discriminator of StyleGAN2 (Karras et al. 2020: blocks of two convolutions and a
smoothed halving beside a linear shortcut, equalised learning rates, batch deviation before the end), told the timestep
by an embedding that is added after each block and starts at zero.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from einops import rearrange, reduce, repeat
from torch import Tensor, nn
from torch.nn import functional as F

from stages.networks.layers import Layers

TIME_CHANNELS = 512
NUM_TOP_CHANNELS = 64
"""A resolution of r pixels has (this times the most channels) / r channels, and at most that most."""
LAST_PX = 4
SLOPE, GAIN = 0.2, math.sqrt(2)


class EqualConv(nn.Module):
    """A convolution whose weights are stored with deviation 1 and scaled when used, so that all learn equally fast."""

    def __init__(self, in_channels: int, out_channels: int, kernel_px: int, bias: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel_px, kernel_px))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        self.scale = 1 / math.sqrt(in_channels * kernel_px**2)

    def forward(self, x: Tensor, stride: int = 1) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        weight = (self.weight * self.scale).to(x.dtype)
        return F.conv2d(x, weight, bias, stride, self.weight.shape[-1] // 2 if stride == 1 else 0)


class EqualLinear(nn.Module):
    """The same for a matrix."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.scale = 1 / math.sqrt(in_channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, (self.weight * self.scale).to(x.dtype), self.bias.to(x.dtype))


def activated(x: Tensor) -> Tensor:
    """Leaky ReLU that keeps the deviation."""
    return F.leaky_relu(x, SLOPE) * GAIN


def smoothed(x: Tensor, padding: int) -> Tensor:
    """(n, c, h, w) through the binomial filter 1 3 3 1 in both directions, against aliasing."""
    line = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=x.dtype, device=x.device) / 8
    kernel = repeat(line[:, None] * line, "h w -> c 1 h w", c=x.shape[1])
    return F.conv2d(F.pad(x, (padding, padding, padding, padding)), kernel, groups=x.shape[1])


class CriticBlock(nn.Module):
    """(n, c, h, w) to (n, c', h / 2, w / 2); what is added for the timestep starts at zero."""

    def __init__(self, in_channels: int, out_channels: int, time_channels: int):
        super().__init__()
        self.conv0 = EqualConv(in_channels, in_channels, 3)
        self.conv1 = EqualConv(in_channels, out_channels, 3)
        self.skip = EqualConv(in_channels, out_channels, 1, bias=False)
        self.time = nn.Linear(time_channels, out_channels)
        nn.init.zeros_(self.time.weight)
        nn.init.zeros_(self.time.bias)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        straight = self.skip(smoothed(x, 1)[..., ::2, ::2])
        bent = activated(self.conv1(smoothed(activated(self.conv0(x)), 2), stride=2))
        return (straight + bent) / math.sqrt(2) + rearrange(self.time(time), "n c -> n c 1 1").to(x.dtype)


class Critic(nn.Module):
    """Pictures (n, 3, size, size) in [-1, 1] and their timesteps (n,) to logits (n,): high for true ones."""

    def __init__(self, size_px: int, max_channels: int):
        super().__init__()
        sides = [size_px >> index for index in range(int(math.log2(size_px // LAST_PX)) + 1)]
        widths = [min(NUM_TOP_CHANNELS * max_channels // side, max_channels) for side in sides]
        width = max(widths[-1], 8)
        self.time = nn.Sequential(nn.Linear(TIME_CHANNELS, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.from_rgb = EqualConv(3, widths[0], 1)
        self.blocks: Layers[CriticBlock] = Layers([CriticBlock(a, b, width) for a, b in pairwise(widths)])
        self.conv = EqualConv(widths[-1] + 1, widths[-1], 3)
        self.hidden = EqualLinear(widths[-1] * sides[-1] ** 2, widths[-1])
        self.out = EqualLinear(widths[-1], 1)

    def forward(self, pictures: Tensor, timesteps: Tensor) -> Tensor:
        time = self.time(sinusoids(timesteps))
        x = activated(self.from_rgb(pictures))
        for block in self.blocks:
            x = block(x, time)
        x = activated(self.conv(with_deviation(x)))
        return self.out(activated(self.hidden(x.flatten(1))))[:, 0]


def sinusoids(timesteps: Tensor) -> Tensor:
    """(n,) to (n, TIME_CHANNELS)."""
    half = TIME_CHANNELS // 2
    rates = torch.exp(-math.log(10_000) * torch.arange(half, device=timesteps.device) / half)
    angles = timesteps.float()[:, None] * rates
    return torch.cat([angles.cos(), angles.sin()], -1)


def with_deviation(x: Tensor, group: int = 4) -> Tensor:
    """One more channel: how much pictures of a group differ, so that a generator that always answers alike is seen."""
    num = math.gcd(len(x), group)
    grouped = rearrange(x, "(g n) c h w -> g n c h w", g=num)
    deviation = (grouped.var(0, unbiased=False) + 1e-8).sqrt()
    mean = reduce(deviation, "n c h w -> n 1 1 1", "mean")
    return torch.cat([x, repeat(mean, "n 1 1 1 -> (g n) 1 h w", g=num, h=x.shape[2], w=x.shape[3])], 1)
