"""Expressions: where parts of one portrait's face lie under any expression, as fields over its picture.

Called by `stages.networks.mover`, and by phase `mover`, which asks for them alone. A face is looked at once, in a
square around its keypoints: that gives `NUM_FIELDS` maps of what can happen to it, such as a lid that falls or lips
that part. A frame's motion tokens say how much of each happens, and so a frame costs a weighted sum. The square is
(g, g) cells; (n, T, D) are tokens, (K, 3) keypoints.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from stages.config import ModelConfig
from stages.moved import cells, spread
from stages.networks.layers import ResnetBlock
from stages.networks.vae import fold

NUM_FIELDS = 16
NUM_TOLD = 6
"""What a field says of a cell: shift right and down, share of paint, and the paint's three colours."""
UNITS = (0.1, 0.1, 3.0, 3.0, 3.0, 3.0)
"""Of these: half squares, then logits."""
SQUARE_CELLS = 64
REACH = 1.5
"""Half of the square's side, in units of the keypoints' own spread: from brows to chin, and beyond the cheeks."""
MAX_INSIDE = 100.0
"""Half squares; keypoints farther from the square's centre are taken as this far."""
TOKEN_CODE = 128
"""Numbers into which the motion tokens of portrait and frame are read before they weigh fields."""
TOKEN_GAIN = 0.25
"""Deviation of the first weights that read them."""


class Expressions(nn.Module):
    """A portrait to fields, and frames' tokens to what happens in its square."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        fine, coarse = config.pose_guider.expression_channels
        num_groups, motion = config.unet.num_norm_groups, config.motion_encoder
        num_tokens, width = motion.num_tokens * motion.token_dim, 2 * coarse
        self.known = nn.Sequential(nn.Linear(num_tokens + 3 * config.keypoints.num_keypoints, width), nn.SiLU())
        self.conv_in = nn.Conv2d(12, fine, 3, padding=1)
        self.fine = ResnetBlock(fine, fine, width, num_groups)
        self.halve = nn.Conv2d(fine, coarse, 3, stride=2, padding=1)
        self.middle = ResnetBlock(coarse, coarse, width, num_groups)
        self.quarter = nn.Conv2d(coarse, coarse, 3, stride=2, padding=1)
        self.coarse = ResnetBlock(coarse, coarse, width, num_groups)
        self.wider = ResnetBlock(2 * coarse, coarse, width, num_groups)
        self.finer = ResnetBlock(coarse + fine, fine, width, num_groups)
        self.norm_out = nn.GroupNorm(num_groups, fine)
        self.conv_out = nn.Conv2d(fine, NUM_FIELDS * NUM_TOLD, 3, padding=1)
        self.read = nn.Linear(2 * num_tokens, TOKEN_CODE)
        self.weigh = nn.Linear(TOKEN_CODE, NUM_FIELDS, bias=False)
        # An expression is a small part of its tokens: with the usual start it is drowned, and nothing learns from it.
        nn.init.normal_(self.read.weight, std=TOKEN_GAIN)
        for parameter in self.conv_out.parameters():
            nn.init.zeros_(parameter)

    def fields(self, portrait: Tensor, keypoints: Tensor, tokens: Tensor) -> Tensor:
        """(NUM_FIELDS, NUM_TOLD, g, g) of a portrait (3, s, s) in [0, 1] with its keypoints and tokens (T, D)."""
        dtype = self.conv_in.weight.dtype
        centre, half = square(keypoints)
        grid = centre + half * cells(2 * SQUARE_CELLS, portrait)
        seen = F.grid_sample(portrait[None].float(), grid[None], padding_mode="border", align_corners=False)
        # Bounded, as fp16 is: keypoints without size are very far from their middle.
        inside = ((keypoints - F.pad(centre, (0, 1))) / half).clamp(-MAX_INSIDE, MAX_INSIDE)
        known = self.known(torch.cat([tokens.float().flatten(), inside.float().flatten()])[None].to(dtype))
        fine = self.fine(self.conv_in(fold((seen * 2 - 1).to(dtype), 2)), known)
        middle = self.middle(self.halve(fine), known)
        coarse = self.coarse(self.quarter(middle), known)
        x = self.wider(torch.cat([_twice(coarse), middle], 1), known)
        x = self.finer(torch.cat([_twice(x), fine], 1), known)
        x = self.conv_out(F.silu(self.norm_out(x)))
        return rearrange(x, "1 (f c) h w -> f c h w", f=NUM_FIELDS)

    def told(self, fields: Tensor, own_tokens: Tensor, tokens: Tensor) -> Tensor:
        """(n, NUM_TOLD, g, g): what tokens (n, T, D) do to the face whose fields and own tokens (T, D) these are. Its
        own tokens do nothing. In fp32 whatever the weights are: it is a difference of two nearly equal numbers."""
        with torch.autocast(fields.device.type, enabled=False):
            changed = self._code(own_tokens, tokens) - self._code(own_tokens, own_tokens[None])
            mixed = torch.einsum("nf,fchw->nchw", F.linear(changed, self.weigh.weight.float()), fields.float())
            return mixed * torch.tensor(UNITS, device=mixed.device)[:, None, None]

    def _code(self, own_tokens: Tensor, tokens: Tensor) -> Tensor:
        """(n, TOKEN_CODE) in fp32."""
        own, flat = own_tokens.float().flatten()[None].expand(len(tokens), -1), tokens.float().flatten(1)
        both = torch.cat([flat - own, flat], 1)
        return F.silu(F.linear(both, self.read.weight.float(), self.read.bias.float()))


def square(keypoints: Tensor) -> tuple[Tensor, Tensor]:
    """Centre (2,) and half side () of the square in which a face with keypoints (K, 3) is looked at."""
    return keypoints.mean(0)[:2], REACH * spread(keypoints)


def seen_at(told: Tensor, places: Tensor, keypoints: Tensor) -> Tensor:
    """(n, NUM_TOLD, h, w): what `Expressions.told` says of places (n, h, w, 2) in the portrait with these keypoints
    (K, 3), shifts in half picture sides; 0 outside the square."""
    centre, half = square(keypoints)
    found = F.grid_sample(told, (places - centre) / half, padding_mode="zeros", align_corners=False)
    return torch.cat([found[:, :2] * half, found[:, 2:]], 1)


def _twice(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="nearest")
