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
from stages.moved import bounded, grown, looked_up, shifts
from stages.networks.layers import ResnetBlock
from stages.networks.vae import fold, unfold

SPLIT = (2, 2, 3, 3)
"""Channels that the network says per place: shifts of the head, of what is beside it, paint, and how much of each."""
NUM_SAID = sum(SPLIT)
FIRST_SHARES = (4.0, 0.0, -3.0)
"""Logits of head, beside it and paint before anything is learned."""
MAX_SHIFT = 1.0
"""Half picture sides; no place is looked up farther from where the guess has it."""


@dataclass(frozen=True)
class Said:
    """Where n pictures are from, in cells of `HeadConfig.grid_px`."""

    head: Tensor
    """(n, g, g, 2) how far away lies the place in the portrait that a cell of the head shows, [-1, 1] across."""
    beside: Tensor
    """(n, g, g, 2) the same of body and backdrop."""
    paint: Tensor
    """(n, 3, g, g) colours in [0, 1] for what the portrait does not show."""
    shares: Tensor
    """(n, 3, g, g) logits of these three."""


class Mover(nn.Module):
    """The portrait (3, s, s) as n frames show it, (n, 3, s, s) in [0, 1]."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head: HeadConfig = config.pose_guider.head
        fine, coarse = config.pose_guider.mover_channels
        num_groups, patch = config.unet.num_norm_groups, self.head.grid_px
        motion = config.motion_encoder
        num_known = 2 * motion.num_tokens * motion.token_dim + 6 * config.keypoints.num_keypoints
        width = 2 * coarse
        self.known = nn.Sequential(nn.Linear(num_known, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.conv_in = nn.Conv2d(9 * patch**2 + 2, fine, 3, stride=2, padding=1)
        self.down = ResnetBlock(fine, fine, width, num_groups)
        self.halve = nn.Conv2d(fine, coarse, 3, stride=2, padding=1)
        self.middle = nn.ModuleList([ResnetBlock(coarse, coarse, width, num_groups) for _ in range(2)])
        self.up = ResnetBlock(coarse + fine, fine, width, num_groups)
        self.norm_out = nn.GroupNorm(num_groups, fine)
        self.conv_out = nn.Conv2d(fine, 4 * NUM_SAID, 3, padding=1)

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
        known = torch.cat([part.float().flatten(1) for part in (own_tokens.expand_as(tokens), tokens)], 1)
        known = torch.cat([known, start.expand_as(end).flatten(1), end.flatten(1)], 1)
        return meant(guess, self._said(seen, guess, known))

    def _said(self, seen: Tensor, guess: Tensor, known: Tensor) -> Tensor:
        """(n, NUM_SAID, g, g) in fp32, g the grid of `guess` (n, g, g, 2)."""
        dtype = self.conv_in.weight.dtype
        shift = rearrange(guess, "n h w c -> n c h w")
        picture = torch.cat([fold(seen.to(dtype), self.head.grid_px), shift.to(dtype)], 1)
        known = self.known(known.to(dtype))
        fine = self.down(F.silu(self.conv_in(picture)), known)
        coarse = self.halve(fine)
        for block in self.middle:
            coarse = block(coarse, known)
        wide = F.interpolate(coarse, size=fine.shape[-2:], mode="nearest")
        x = self.up(torch.cat([wide, fine], 1), known)
        return unfold(self.conv_out(F.silu(self.norm_out(x))), 2).float()


def meant(guess: Tensor, said: Tensor) -> Said:
    """What the network's channels (n, NUM_SAID, g, g) mean, given the first guess (n, g, g, 2)."""
    head, beside, paint, shares = said.split(SPLIT, dim=1)
    first = torch.tensor(FIRST_SHARES, device=said.device)[:, None, None]
    return Said(guess + _shift(head), _shift(beside), paint.sigmoid(), shares + first)


def composed(portrait: Tensor, said: Said) -> Tensor:
    """(n, 3, s, s) in [0, 1]: portrait (3, s, s) looked up where head and what is beside it lead, and paint, by their
    shares."""
    side = portrait.shape[-1]
    head, beside, painted = grown(said.shares, side).softmax(1).split(1, dim=1)
    looked = head * looked_up(portrait, said.head) + beside * looked_up(portrait, said.beside)
    return looked + painted * grown(said.paint, side)


def _shift(said: Tensor) -> Tensor:
    return rearrange(MAX_SHIFT * torch.tanh(said), "n c h w -> n h w c")
