"""Pose guider: canvases (`stages.canvas`) to a feature map that the denoiser adds after its first convolution.

Spec section 5; the tensor names are the official ones. Called by the denoise stage, once per new chunk.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stages.config import PoseGuiderConfig
from stages.networks.mover import Mover
from stages.networks.vae import fold


class PoseGuider(nn.Module):
    """Canvases (n, 3 or 9, H, W) in [0, 1] to (n, out_channels, h, w); H is h · `config.downscale`.

    With `base_channels` (for canvases that show the portrait) twice as many channels follow: the moved and the unmoved
    portrait in latents, by a linear map of their pixels. The denoiser's answer starts from them. `mover` makes a part
    of the canvases (`stages.canvas` calls it) and is kept here, with the weights that belong to it.
    """

    def __init__(self, config: PoseGuiderConfig, out_channels: int, base_channels: int = 0, mover: Mover | None = None):
        super().__init__()
        self.mover = mover
        self.pixel_patch = config.pixel_patch
        self.conv_in = nn.Conv2d(config.canvas_channels * config.pixel_patch**2, config.channels[0], 3, padding=1)
        blocks: list[nn.Module] = []
        for narrow, wide in pairwise(config.channels):
            blocks += [nn.Conv2d(narrow, narrow, 3, padding=1), nn.Conv2d(narrow, wide, 3, padding=1, stride=2)]
        self.blocks = nn.ModuleList(blocks)
        self.conv_out_modify = nn.Conv2d(config.channels[-1], out_channels, 3, padding=1)
        self.base: nn.Conv2d | None = None
        if base_channels:
            self.base = nn.Conv2d(3, base_channels, config.downscale, stride=config.downscale)
            self.base_in = nn.Conv2d(2 * base_channels, out_channels, 1)

    def forward(self, canvases: Tensor) -> Tensor:
        x = F.silu(self.conv_in(fold(canvases, self.pixel_patch)))
        for conv in self.blocks:
            x = F.silu(conv(x))
        x = self.conv_out_modify(x)
        if self.base is None:
            return x
        bases = torch.cat([self.base(part) for part in canvases[:, 3:].chunk(2, dim=1)], 1)
        return torch.cat([x + self.base_in(bases), bases], 1)
