"""Mover: the portrait as a frame's keypoints and motion tokens move it, by places that a small network says.

Called by `stages.canvas` for a small model's canvases. `stages.moved` gives the first guess, a head that turns as an
ellipsoid; this network looks at the guess and says how the places in it are wrong, what lies beside the head, and where
neither helps, as inside a mouth, it paints. Places are looked up, not drawn: so a small network moves sharp details.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from stages.config import HeadConfig, ModelConfig
from stages.moved import MIN_SIZE, bounded, cells, grown, looked_up, looked_up_at, shifts
from stages.networks.layers import ResnetBlock
from stages.networks.vae import fold, unfold

SPLIT = (2, 2, 3, 3, 3)
"""Channels that the network says per place: shifts of the head, of what is beside it, paint, how much of each, tint."""
NUM_SAID = sum(SPLIT)
FINER = 2
"""Cells that the network speaks of, along one cell of its guess: an iris moves by less than the latter."""
FIRST_SHARES = (4.0, 0.0, -3.0)
"""Logits of head, beside it and paint before anything is learned."""
MAX_SHIFT = 1.0
"""Half picture sides; no place is looked up farther from where the guess has it."""
TOKEN_CODE = 64
"""Numbers into which the motion tokens of portrait and frame are read before they are written around keypoints."""
TOKEN_GAIN = 0.25
"""Deviation of the first weights that read them."""
SPOT_REACH = 0.25
"""Deviation of the spots around keypoints, in units of the keypoints' own spread: about an eye."""


@dataclass(frozen=True)
class Said:
    """Where n pictures are from, in cells `FINER` times finer than `HeadConfig.grid_px`."""

    head: Tensor
    """(n, g, g, 2) how far away lies the place in the portrait that a cell of the head shows, [-1, 1] across."""
    beside: Tensor
    """(n, g, g, 2) the same of body and backdrop."""
    paint: Tensor
    """(n, 3, g, g) colours in [0, 1] for what the portrait does not show."""
    shares: Tensor
    """(n, 3, g, g) logits of these three."""
    tint: Tensor
    """(n, 3, g, g) what light adds to or takes from them, as a head turns in it."""


class Mover(nn.Module):
    """The portrait (3, s, s) as n frames show it, (n, 3, s, s) in [0, 1]."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head: HeadConfig = config.pose_guider.head
        fine, coarse = config.pose_guider.mover_channels
        num_groups, patch = config.unet.num_norm_groups, self.head.grid_px
        motion, num_keypoints = config.motion_encoder, config.keypoints.num_keypoints
        num_tokens = 2 * motion.num_tokens * motion.token_dim
        width = 2 * coarse
        self.known = nn.Sequential(
            nn.Linear(num_tokens + 6 * num_keypoints, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        )
        self.expression = nn.Sequential(nn.Linear(num_tokens, TOKEN_CODE), nn.SiLU())
        self.spots = nn.Linear(TOKEN_CODE, 3 * num_keypoints * (fine + NUM_SAID))
        # An expression is a small part of its tokens: with the usual start it is drowned, and nothing learns from it.
        nn.init.normal_(self.expression[0].get_parameter("weight"), std=TOKEN_GAIN)
        self.conv_in = nn.Conv2d(9 * patch**2 + 2, fine, 3, stride=2, padding=1)
        self.down = ResnetBlock(fine, fine, width, num_groups)
        self.halve = nn.Conv2d(fine, coarse, 3, stride=2, padding=1)
        self.middle = nn.ModuleList([ResnetBlock(coarse, coarse, width, num_groups) for _ in range(2)])
        self.up = ResnetBlock(coarse + fine, fine, width, num_groups)
        self.norm_out = nn.GroupNorm(num_groups, fine)
        self.conv_out = nn.Conv2d(fine, (2 * FINER) ** 2 * NUM_SAID, 3, padding=1)
        for silent_at_first in (self.spots, self.conv_out):
            for parameter in silent_at_first.parameters():
                nn.init.zeros_(parameter)

    def forward(
        self, drawn: Tensor, portrait: Tensor, start: Tensor, end: Tensor, own_tokens: Tensor, tokens: Tensor
    ) -> Tensor:
        """drawn (n, 3, s, s) keypoints in [0, 1]; the portrait's keypoints (K, 3) and tokens (T, D), and the frames'
        (n, K, 3) and (n, T, D). Places are calculated in fp32 whatever the weights are."""
        return composed(portrait.float(), self.say(drawn, portrait, start, end, own_tokens, tokens))

    def say(
        self, drawn: Tensor, portrait: Tensor, start: Tensor, end: Tensor, own_tokens: Tensor, tokens: Tensor
    ) -> Said:
        """What `forward` composes its pictures of, from the same."""
        portrait, start, end = portrait.float(), bounded(start), bounded(end)
        guess = shifts(start, end, portrait.shape[-1] // self.head.grid_px, self.head)
        guessed = looked_up(portrait, guess)
        seen = torch.cat([drawn.float(), guessed, portrait.expand_as(guessed)], 1)
        own, tokens = own_tokens.float().expand_as(tokens).flatten(1), tokens.float().flatten(1)
        told = torch.cat([own, tokens, start.expand_as(end).flatten(1), end.flatten(1)], 1)
        return meant(guess, self._said(seen, guess, told, torch.cat([tokens - own, tokens], 1), end))

    def _said(self, seen: Tensor, guess: Tensor, told: Tensor, changed: Tensor, end: Tensor) -> Tensor:
        """(n, NUM_SAID, g, g) in fp32, g being `FINER` times the grid of `guess` (n, h, h, 2)."""
        dtype = self.conv_in.weight.dtype
        shift = rearrange(guess, "n h w c -> n c h w")
        picture = torch.cat([fold(seen.to(dtype), self.head.grid_px), shift.to(dtype)], 1)
        known = self.known(told.to(dtype))
        x = self.conv_in(picture)
        spots = self.spots(self.expression(changed.to(dtype)))
        spots = rearrange(spots, "n (k c) -> n k c", c=x.shape[1] + NUM_SAID)
        to_features, to_answer = spots.split((x.shape[1], NUM_SAID), dim=-1)
        fine = self.down(F.silu(x + spotted(end, to_features, x.shape[-1])), known)
        coarse = self.halve(fine)
        for block in self.middle:
            coarse = block(coarse, known)
        wide = F.interpolate(coarse, size=fine.shape[-2:], mode="nearest")
        x = self.up(torch.cat([wide, fine], 1), known)
        said = unfold(self.conv_out(F.silu(self.norm_out(x))), 2 * FINER)
        # What an expression does to anybody's face is nearly linear, and learned at once by this short cut.
        usual = spotted(end, to_answer, guess.shape[1])
        return (said + F.interpolate(usual, scale_factor=FINER, mode="nearest")).float()


def spotted(keypoints: Tensor, values: Tensor, side: int) -> Tensor:
    """(n, c, side, side): the sum of soft spots around keypoints (n, K, 3), each of them level, sloping right and
    sloping down by values (n, 3 · K, c). So a convolution is told about an eye where the eye is."""
    spread = (keypoints - keypoints.mean(1, keepdim=True)).square().sum(-1).mean(1).sqrt().clamp(min=MIN_SIZE)
    away = cells(side, keypoints) - rearrange(keypoints[..., :2], "n k c -> n k 1 1 c")
    right, down = (away / (SPOT_REACH * rearrange(spread, "n -> n 1 1 1 1"))).unbind(-1)
    level = torch.exp(-(right.square() + down.square()) / 2)
    spots = torch.cat([level, level * right, level * down], 1).to(values.dtype)
    return torch.einsum("nkhw,nkc->nchw", spots, values)


def meant(guess: Tensor, said: Tensor) -> Said:
    """What the network's channels (n, NUM_SAID, g, g) mean, given the first guess (n, h, h, 2)."""
    head, beside, paint, shares, tint = said.split(SPLIT, dim=1)
    first = torch.tensor(FIRST_SHARES, device=said.device)[:, None, None]
    fine = rearrange(grown(rearrange(guess, "n h w c -> n c h w"), said.shape[-1]), "n c h w -> n h w c")
    return Said(fine + _shift(head), _shift(beside), paint.sigmoid(), shares + first, torch.tanh(tint))


def composed(portrait: Tensor, said: Said) -> Tensor:
    """(n, 3, s, s) in [0, 1]: portrait (3, s, s) looked up where head and what is beside it lead, and paint, by their
    shares, tinted."""
    side = portrait.shape[-1]
    head, beside, painted = said.shares.softmax(1).split(1, dim=1)
    over = painted * said.paint + said.tint
    places = (rearrange(part, "n h w c -> n c h w") for part in (said.head, said.beside))
    # Grown at once, as that is what takes the time.
    wide = grown(torch.cat([*places, head, beside, over], 1), side)
    to_head, to_beside, head, beside, over = wide.split((2, 2, 1, 1, 3), dim=1)
    looked = head * looked_up_at(portrait, to_head) + beside * looked_up_at(portrait, to_beside)
    return (looked + over).clamp(0, 1)


def _shift(said: Tensor) -> Tensor:
    return rearrange(MAX_SHIFT * torch.tanh(said), "n c h w -> n h w c")
