"""Pose guider: drawn keypoints to a feature map that the denoiser adds after its first convolution.

Spec section 5; the tensor names are the official ones. Called by the denoise stage, once per new chunk.
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F

from stages.config import PoseGuiderConfig


class PoseGuider(nn.Module):
    """Canvases (n, 3, H, W) in [0, 1] to (n, out_channels, h, w), the sides halved at each step of `channels`."""

    def __init__(self, config: PoseGuiderConfig, out_channels: int):
        super().__init__()
        self.conv_in = nn.Conv2d(3, config.channels[0], 3, padding=1)
        blocks: list[nn.Module] = []
        for narrow, wide in pairwise(config.channels):
            blocks += [nn.Conv2d(narrow, narrow, 3, padding=1), nn.Conv2d(narrow, wide, 3, padding=1, stride=2)]
        self.blocks = nn.ModuleList(blocks)
        self.conv_out_modify = nn.Conv2d(config.channels[-1], out_channels, 3, padding=1)

    def forward(self, canvases: Tensor) -> Tensor:
        x = F.silu(self.conv_in(canvases))
        for conv in self.blocks:
            x = F.silu(conv(x))
        return self.conv_out_modify(x)
