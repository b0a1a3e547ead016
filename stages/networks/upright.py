"""Upright: a head's angles from a square that is laid around it, turned upright and brought to one size.

Part of `KeypointExtractor`, for extractors that have it. In whole pictures heads are anywhere, of any size and roll,
and much of a network is needed to tell that from how they are turned. Where the extractor has found the head, a small
one sees everybody's at the same place.
"""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from stages.config import KeypointConfig
from stages.networks.normed import NormedBlock, normed

REACH = 1.25
"""Half of the square's side in head units, the scale of the keypoints: all of a head, and its chin when it speaks."""
UNITS = (10.0, 15.0, 2.0)
"""Degrees of pitch, yaw and roll that the network's numbers mean."""
NUM_HIDDEN = 160
MOMENTUM = 0.01
"""Of the norms' statistics: what is handed on has been averaged over some hundred steps, as weights are."""
MIN_SCALE = 1e-3
"""Heads are not taken for smaller than this."""
MAX_PLACE = 100.0
"""Nor for farther away than this, in half picture sides."""


class Upright(nn.Module):
    """Squares (n, 3, side, side) in [-1, 1] to degrees (n, 3): pitch, yaw, and how far roll is off that by which the
    square was turned."""

    def __init__(self, config: KeypointConfig):
        super().__init__()
        channels, width = config.upright_channels, config.upright_px // 2 ** len(config.upright_channels)
        layers: list[nn.Module] = []
        for before, after, depth in zip((3, *channels), channels, config.upright_depths, strict=False):
            blocks = (NormedBlock(after, MOMENTUM) for _ in range(depth))
            layers += [normed(before, after, 2, MOMENTUM), nn.ReLU(), *blocks]
        self.layers = nn.Sequential(*layers)
        self.squeeze = nn.Conv2d(channels[-1], 32, 1)
        self.hidden = nn.Linear(32 * width**2, NUM_HIDDEN)
        self.out = nn.Linear(NUM_HIDDEN, 3)

    def trunk(self) -> list[nn.Module]:
        """What may run in bfloat16."""
        return [self.layers, self.squeeze]

    def forward(self, squares: Tensor) -> Tensor:
        return self.degrees(self.seen(squares))

    def seen(self, squares: Tensor) -> Tensor:
        """(n, NUM_HIDDEN) what `degrees` is read from."""
        x = F.relu(self.squeeze(self.layers(squares.to(self.squeeze.weight.dtype))))
        # In fp32 also where networks train in mixed precision, as the next.
        with torch.autocast(x.device.type, enabled=False):
            return F.relu(self.hidden(x.float().flatten(1)))

    def degrees(self, seen: Tensor) -> Tensor:
        with torch.autocast(seen.device.type, enabled=False):
            said = self.out(seen)
            return said * torch.tensor(UNITS, device=said.device)


def upright(images: Tensor, translation: Tensor, scale: Tensor, roll: Tensor, side: int) -> Tensor:
    """(n, 3, side, side) squares of pictures (n, 3, h, h) around heads at `translation` (n, 2), [-1, 1] across, of
    `scale` (n,) and `roll` (n,) degrees."""
    # In fp32 also where networks train in mixed precision: bfloat16 is off by a part of a pixel.
    with torch.autocast(images.device.type, enabled=False):
        half = REACH * scale.float().nan_to_num().clamp(min=MIN_SCALE)
        angle = roll.float().nan_to_num() / 180 * math.pi
        across, down = half * angle.cos(), half * angle.sin()
        middle = translation.float().nan_to_num().clamp(-MAX_PLACE, MAX_PLACE)
        linear = rearrange([across, -down, down, across], "(i j) n -> n i j", i=2)
        places = torch.cat([linear, middle[..., None]], 2)
        grid = F.affine_grid(places, [len(images), 3, side, side], align_corners=False)
        return F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)
