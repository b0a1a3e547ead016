"""Blend: how a moved head, what lies beside it and paint are laid over one another, seen closely.

Called by `stages.networks.mover`. That network sees cells of eight pixels, and a quarter of its pictures' error lay
along outlines. This one sees the three layers as they have come out, in cells of two pixels: which share of each is
shown is then told from the colours on both sides, and from what the head covers when it is turned as a solid.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from stages.networks.vae import fold, unfold

NUM_LAYERS = 3
PATCH = 2
WIDTH = 32
MAX_LOGIT, LOGIT_UNIT = 8.0, 4.0


class Blend(nn.Module):
    """Layers (n, 3, 3, g, g), each a picture in [0, 1], logits of their shares (n, 3, g, g) and how much of each cell
    the head covers (n, 1, g, g) to better logits. Before anything is learned they stay as they are."""

    def __init__(self) -> None:
        super().__init__()
        # Of every layer a share and three colours, and what is covered.
        self.conv_in = nn.Conv2d((4 * NUM_LAYERS + 1) * PATCH**2, WIDTH, 3, padding=1)
        self.middle = nn.ModuleList([nn.Conv2d(WIDTH, WIDTH, 3, padding=1) for _ in range(2)])
        self.conv_out = nn.Conv2d(WIDTH, NUM_LAYERS * PATCH**2, 3, padding=1)
        for parameter in self.conv_out.parameters():
            nn.init.zeros_(parameter)

    def forward(self, layers: Tensor, shares: Tensor, cover: Tensor) -> Tensor:
        logits = shares.clamp(-MAX_LOGIT, MAX_LOGIT)
        colours = rearrange(layers, "n l c h w -> n (l c) h w") * 2 - 1
        seen = torch.cat([logits / LOGIT_UNIT, colours, cover * 2 - 1], 1)
        seen = fold(seen.to(self.conv_in.weight.dtype), PATCH)
        first, second = self.middle
        x = F.silu(first(F.silu(self.conv_in(seen))))
        x = x + F.silu(second(x))
        return logits + unfold(self.conv_out(x), PATCH).float()
