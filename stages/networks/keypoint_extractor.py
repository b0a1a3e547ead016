"""Keypoint extractor: a face picture to implicit 3D keypoints and the head's pose (ConvNeXt V2, spec section 6.1).

Called by the motion stage on every frame; `stages.keypoints` turns its raw output into keypoints. The tensor names are
the official ones without their leading `detector.`; hence `stages` here are a ConvNeXt's, not the pipeline's.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from einops import rearrange, reduce
from torch import Tensor, nn
from torch.nn import functional as F

from stages.config import KeypointConfig

NORM_EPS = 1e-6


@dataclass(frozen=True)
class RawPose:
    """The network's heads for n pictures, before any interpretation."""

    keypoints: Tensor
    """(n, K · 3)."""
    pitch: Tensor
    """(n, bins) logits, like `yaw` and `roll`."""
    yaw: Tensor
    roll: Tensor
    translation: Tensor
    """(n, 3)."""
    scale: Tensor
    """(n, 1)."""


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


def _downsample_layers(dims: tuple[int, ...]) -> nn.ModuleList:
    stem = nn.Sequential(nn.Conv2d(3, dims[0], 4, stride=4), ChannelNorm(dims[0]))
    halvings = [
        nn.Sequential(ChannelNorm(narrow), nn.Conv2d(narrow, wide, 2, stride=2)) for narrow, wide in pairwise(dims)
    ]
    return nn.ModuleList([stem, *halvings])


class KeypointExtractor(nn.Module):
    """Pictures (n, 3, image_px, image_px) in [0, 1] to a RawPose of n."""

    def __init__(self, config: KeypointConfig):
        super().__init__()
        width, num_bins = config.dims[-1], config.num_angle_bins
        self.downsample_layers = _downsample_layers(config.dims)
        depths = zip(config.dims, config.depths, strict=True)
        self.stages = nn.ModuleList([nn.Sequential(*(Block(dim) for _ in range(depth))) for dim, depth in depths])
        self.gather = nn.Conv2d(width, width, config.gathered_cells) if config.gathered_cells else None
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.fc_kp = nn.Linear(width, 3 * config.num_keypoints)
        self.fc_scale = nn.Linear(width, 1)
        self.fc_pitch = nn.Linear(width, num_bins)
        self.fc_yaw = nn.Linear(width, num_bins)
        self.fc_roll = nn.Linear(width, num_bins)
        self.fc_t = nn.Linear(width, 3)

    def forward(self, images: Tensor) -> RawPose:
        x = images
        for downsample, blocks in zip(self.downsample_layers, self.stages, strict=True):
            x = blocks(downsample(x))
        x = self.norm(reduce(x if self.gather is None else self.gather(x), "n c h w -> n c", "mean"))
        return RawPose(
            keypoints=self.fc_kp(x),
            pitch=self.fc_pitch(x),
            yaw=self.fc_yaw(x),
            roll=self.fc_roll(x),
            translation=self.fc_t(x),
            scale=self.fc_scale(x),
        )
