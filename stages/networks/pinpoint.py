"""Pinpoint: where each keypoint lies in a picture, to a part of a pixel, for extractors that have it.

Part of `KeypointExtractor`. A head's pitch moves its features by a few hundredths of its size against each other, less
than a map of 4x4 cells tells: here fine cells say where, and the coarse maps of the extractor say what is there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange, reduce
from torch import Tensor, nn
from torch.nn import functional as F

from stages.networks.convnext import ChannelNorm

PATCH_PX = 4
READ_SIZE = 4.0
"""Of the faces that `read` sees: their features then differ from person to person and pose to pose by about 1."""


class Residual(nn.Module):
    """Two convolutions beside a shortcut, (n, c, h, w) to the same: at fine cells cheaper than a ConvNeXt's block."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.conv1(x)))


class Pinpoint(nn.Module):
    """Adds to the extractor's last vector what exact places tell. Silent at first."""

    def __init__(self, dims: tuple[int, ...], channels: int, num_keypoints: int):
        super().__init__()
        width = dims[-1]
        self.stem = nn.Sequential(nn.Conv2d(3, channels, PATCH_PX, stride=PATCH_PX), ChannelNorm(channels))
        self.laterals = nn.ModuleList([nn.Conv2d(dim, channels, 1) for dim in dims])
        self.block = Residual(channels)
        self.heat = nn.Conv2d(channels, num_keypoints, 1)
        self.read = nn.Sequential(nn.Linear(3 * num_keypoints + 3 + width, width), nn.GELU(), nn.Linear(width, width))
        nn.init.zeros_(self.read[-1].get_parameter("weight"))
        nn.init.zeros_(self.read[-1].get_parameter("bias"))

    def look(self, images: Tensor, maps: Sequence[Tensor]) -> Tensor:
        """Pictures (n, 3, h, w) and the extractor's maps of them, each half as wide as the one before, to heat
        (n, K, h/4, w/4), in logits over the cells."""
        fine = self.stem(images)
        seen = [lateral(coarse) for lateral, coarse in zip(self.laterals, maps, strict=True)]
        x = seen.pop()
        for finer in (*reversed(seen), fine):
            x = finer + F.interpolate(x, finer.shape[-2:], mode="bilinear", align_corners=False)
        return self.heat(self.block(x))

    def trunk(self) -> list[nn.Module]:
        """What makes the heat."""
        return [self.stem, self.laterals, self.block, self.heat]

    def forward(self, x: Tensor, heat: Tensor) -> Tensor:
        """(n, width) and heat to (n, width): with what places, relative to each other, and how sure they are tell."""
        places, spreads = places_of(heat)
        middle = places.mean(dim=1, keepdim=True)
        size = (reduce((places - middle).square(), "n k c -> n 1 1", "mean") + 1e-6).sqrt()
        shape = rearrange((places - middle) / size, "n k c -> n (k c)") * READ_SIZE
        position = torch.cat([middle.flatten(1), size.flatten(1).log()], dim=1)
        return x + self.read(torch.cat([shape, spreads / size[..., 0], position, x], dim=1))


def places_of(heat: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (n, K, h, w) to places (n, K, 2), x and y in [-1, 1] across the picture, and spreads (n, K): the mean and
    the deviation of where a keypoint may be."""
    height, width = heat.shape[-2:]
    share = rearrange(rearrange(heat, "n k h w -> n k (h w)").softmax(-1), "n k (h w) -> n k h w", h=height)
    x, y = ((torch.arange(side, device=heat.device) + 0.5) / side * 2 - 1 for side in (width, height))
    across, down = reduce(share, "n k h w -> n k w", "sum"), reduce(share, "n k h w -> n k h", "sum")
    mean_x, mean_y = across @ x, down @ y
    spread = (across * (x - mean_x[..., None]).square()).sum(-1) + (down * (y - mean_y[..., None]).square()).sum(-1)
    return torch.stack([mean_x, mean_y], dim=-1), (spread + 1e-6).sqrt()
