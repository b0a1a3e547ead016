"""Parts of a ConvNeXt V2, for `keypoint_extractor` and `pinpoint`. Tensor names are the official ones."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

NORM_EPS = 1e-6


class ChannelNorm(nn.Module):
    """LayerNorm over the channels of (n, c, h, w), always in fp32, with the authors' order of operations.

    The expected angle over 66 bins magnifies rounding errors; `F.layer_norm` doubles its distance from the originals.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        centred = x.float() - x.float().mean(dim=1, keepdim=True)
        variance = centred.square().mean(dim=1, keepdim=True)
        normed = centred / torch.sqrt(variance + NORM_EPS)
        return (self.weight[:, None, None] * normed + self.bias[:, None, None]).to(x.dtype)


class ResponseNorm(nn.Module):
    """Global response normalisation over (n, h, w, c): each channel weighed by its norm relative to the others'."""

    def __init__(self, channels: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, channels))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, channels))

    def forward(self, x: Tensor) -> Tensor:
        if not x.requires_grad:
            # Several times as quick as torch's norm over two dimensions and nearer to the exact one, but without a
            # slope at 0.
            norm = x.float().square().sum(dim=(1, 2), keepdim=True).sqrt().to(x.dtype)
        else:
            norm = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)
        relative = norm / (norm.mean(dim=-1, keepdim=True) + 1e-6)
        return self.gamma * (x * relative) + self.beta + x


class Block(nn.Module):
    """ConvNeXt V2 block: depthwise 7x7, then a widened pointwise pair; (n, c, h, w) to the same."""

    def __init__(self, channels: int):
        super().__init__()
        self.dwconv = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=NORM_EPS)
        self.pwconv1 = nn.Linear(channels, 4 * channels)
        self.grn = ResponseNorm(4 * channels)
        self.pwconv2 = nn.Linear(4 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        residual = self.norm(rearrange(self.dwconv(x), "n c h w -> n h w c"))
        residual = self.pwconv2(self.grn(F.gelu(self.pwconv1(residual))))
        return x + rearrange(residual, "n h w c -> n c h w")
