"""Light: how bright one portrait's light makes a surface, by the way that it faces.

Called by `stages.networks.mover`, once for a portrait, and by phase `mover`, which asks for it: of drawn people it is
exactly known. A head that turns keeps its colours, and the light stays where it is: so where a part of the head comes
to face another way, it is brighter or darker by what this says of both ways (`brightened`).
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from stages.config import ModelConfig
from stages.moved import cells
from stages.networks.expressions import square
from stages.networks.vae import fold

LIGHT_CELLS = 16
"""Cells along the side of a light's map: where a surface faces, x and y of its unit normal in [-1, 1]."""
SQUARE_PX = 64
"""Side of the square around the keypoints in which light is looked for."""
CODE = 64
MAX_BRIGHTNESS = 6.0
"""No logarithm of brightness is larger or smaller: it stays finite in fp16."""
MAX_BRIGHTENING = 1.5
"""Logarithm of how many times brighter or darker anything becomes, at most."""


class Light(nn.Module):
    """Portraits (n, 3, s, s) in [0, 1], their keypoints (n, K, 3) and shapes (n, 5, g, g) of `stages.networks.depths`
    to logarithms of brightness (n, 3, LIGHT_CELLS, LIGHT_CELLS)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        fine, coarse = config.pose_guider.light_channels
        self.conv_in = nn.Conv2d(4 * 6, fine, 3, padding=1)
        self.halve = nn.Conv2d(fine, coarse, 3, stride=2, padding=1)
        self.quarter = nn.Conv2d(coarse, coarse, 3, stride=2, padding=1)
        self.read = nn.Linear(coarse * (SQUARE_PX // 8) ** 2, CODE)
        self.out = nn.Linear(CODE, 3 * LIGHT_CELLS**2)
        for parameter in self.out.parameters():
            nn.init.zeros_(parameter)

    def forward(self, portraits: Tensor, keypoints: Tensor, shapes: Tensor) -> Tensor:
        dtype = self.conv_in.weight.dtype
        seen = torch.cat([portraits.float() * 2 - 1, _shown(shapes, portraits)], 1)
        squares = [square(points) for points in keypoints]
        grid = torch.stack([centre + half * cells(SQUARE_PX, portraits) for centre, half in squares])
        inside = F.grid_sample(seen, grid, padding_mode="border", align_corners=False)
        x = F.silu(self.conv_in(fold(inside.to(dtype), 2)))
        x = F.silu(self.quarter(F.silu(self.halve(x))))
        told = self.out(F.silu(self.read(x.flatten(1)))).float()
        told = told.clamp(-MAX_BRIGHTNESS, MAX_BRIGHTNESS)
        return rearrange(told, "n (c h w) -> n c h w", c=3, h=LIGHT_CELLS)


def brightened(light: Tensor, normals: Tensor) -> Tensor:
    """(n, 3, g, g) logarithms: how much brighter what faced as the first three of `normals` (n, 6, g, g) say is when it
    faces as the last three do, in the light (3, LIGHT_CELLS, LIGHT_CELLS). 0 where both are 0."""
    before, after = (_brightness(light, part) for part in normals.float().chunk(2, dim=1))
    return (after - before).clamp(-MAX_BRIGHTENING, MAX_BRIGHTENING)


def _brightness(light: Tensor, normals: Tensor) -> Tensor:
    """(n, 3, g, g) that of what faces as normals (n, 3, g, g), of any length, say."""
    unit = F.normalize(normals, dim=1, eps=1e-3)[:, :2]
    grid = rearrange(unit, "n c h w -> 1 (n h) w c")
    found = F.grid_sample(light[None].float(), grid, padding_mode="border", align_corners=False)
    return rearrange(found, "1 c (n h) w -> n c h w", n=len(normals))


def _shown(shapes: Tensor, portraits: Tensor) -> Tensor:
    """(n, 3, s, s): whether there is a head, and x and y of where it faces."""
    told = torch.cat([shapes[:, 1:2].sigmoid(), shapes[:, 2:4]], 1)
    return F.interpolate(told.float(), portraits.shape[-2:], mode="nearest")
