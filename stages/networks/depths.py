"""Depths: how far from the viewer lies every cell of the head in a portrait, hair included, which way it faces, how
thick the head is there, and where it ends.

Called by `stages.networks.mover`, once for a portrait, and by phase `mover`, which asks for it: of drawn people it is
exactly known. What is learned is how the head differs from an ellipsoid around the keypoints.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from stages.config import HeadConfig, ModelConfig
from stages.moved import cells, spread
from stages.networks.layers import ResnetBlock
from stages.networks.vae import fold, unfold
from stages.surface import directions

FINER = 2
"""Cells along one cell of `HeadConfig.grid_px`."""
MAX_DEPTH = 10.0
"""Nothing lies farther from the ellipsoid, in units of `stages.moved.spread` of the keypoints."""
MAX_ASIDE = 0.98
"""Nothing faces aside more than this, in lengths of its normal across the picture."""


class Depths(nn.Module):
    """Portraits (n, 3, s, s) in [0, 1] and their keypoints (n, K, 3) to (n, 5, g, g): depths from the keypoints' mean,
    in half picture sides, logits of belonging to the head, x and y of where its surface faces (unit normals), and how
    much farther away its back lies."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head: HeadConfig = config.pose_guider.head
        fine, coarse = config.pose_guider.depth_channels
        num_groups, width = config.unet.num_norm_groups, 2 * coarse
        self.known = nn.Sequential(nn.Linear(3 * config.keypoints.num_keypoints, width), nn.SiLU())
        self.conv_in = nn.Conv2d(3 * self.head.grid_px**2 + 1, fine, 3, padding=1)
        self.fine = ResnetBlock(fine, fine, width, num_groups)
        self.halve = nn.Conv2d(fine, coarse, 3, stride=2, padding=1)
        self.middle = ResnetBlock(coarse, coarse, width, num_groups)
        self.quarter = nn.Conv2d(coarse, coarse, 3, stride=2, padding=1)
        self.coarse = nn.ModuleList([ResnetBlock(coarse, coarse, width, num_groups) for _ in range(2)])
        self.wider = ResnetBlock(2 * coarse, coarse, width, num_groups)
        self.finer = ResnetBlock(coarse + fine, fine, width, num_groups)
        self.norm_out = nn.GroupNorm(num_groups, fine)
        self.conv_out = nn.Conv2d(fine, 5 * FINER**2, 3, padding=1)
        for parameter in self.conv_out.parameters():
            nn.init.zeros_(parameter)

    def forward(self, portraits: Tensor, keypoints: Tensor) -> Tensor:
        dtype, side = self.conv_in.weight.dtype, portraits.shape[-1] // self.head.grid_px
        known = self.known(keypoints.flatten(1).to(dtype))
        pictures = fold((portraits.float() * 2 - 1).to(dtype), self.head.grid_px)
        guess = ellipsoid(keypoints, side, self.head)
        fine = self.fine(self.conv_in(torch.cat([pictures, guess.to(dtype)], 1)), known)
        middle = self.middle(self.halve(fine), known)
        coarse = self.quarter(middle)
        for block in self.coarse:
            coarse = block(coarse, known)
        x = self.wider(torch.cat([_as_wide(coarse, middle), middle], 1), known)
        x = self.finer(torch.cat([_as_wide(x, fine), fine], 1), known)
        told = unfold(self.conv_out(F.silu(self.norm_out(x))), FINER).float()
        further, is_head, aside, thicker = told.split((1, 1, 2, 1), 1)
        unit = rearrange(spread(keypoints), "n -> n 1 1 1")
        first = ellipsoid(keypoints, FINER * side, self.head)
        depth = first + unit * further.clamp(-MAX_DEPTH, MAX_DEPTH)
        centre = unit * self.head.centre[2]
        thickness = (2 * (centre - first) + unit * thicker.clamp(-MAX_DEPTH, MAX_DEPTH)).clamp(min=0)
        return torch.cat([depth, is_head, facing(first[:, 0], aside), thickness], 1)


def facing(depth: Tensor, aside: Tensor) -> Tensor:
    """(n, 2, g, g) x and y of where the surface of depths (n, g, g) faces, and `aside` (n, 2, g, g) from there."""
    first = torch.stack([directions(one)[..., :2] for one in depth])
    away = rearrange(first, "n h w c -> n c h w") + aside
    return away * (MAX_ASIDE / away.norm(dim=1, keepdim=True).clamp(min=MAX_ASIDE))


def ellipsoid(keypoints: Tensor, side: int, head: HeadConfig) -> Tensor:
    """(n, 1, side, side) depths of the front of an ellipsoid around keypoints (n, K, 3); around it, those of its
    outline."""
    unit = rearrange(spread(keypoints), "n -> n 1")
    middle = keypoints.mean(1) + unit * torch.tensor(head.centre, device=keypoints.device)
    radii = unit * torch.tensor(head.radii, device=keypoints.device)
    away = rearrange(cells(side, keypoints), "h w c -> 1 h w c") - rearrange(middle[:, :2], "n c -> n 1 1 c")
    reach = (away / rearrange(radii[:, :2], "n c -> n 1 1 c")).square().sum(-1)
    bulge = rearrange(radii[:, 2], "n -> n 1 1") * (1 - reach).clamp(min=0).sqrt()
    return rearrange(unit[:, :, None] * head.centre[2] - bulge, "n h w -> n 1 h w")


def _as_wide(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, size=like.shape[-2:], mode="nearest")
