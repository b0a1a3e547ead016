"""Mover: the portrait as a frame's keypoints and motion tokens move it, by places that a small network says.

Called by the motion stage, by `stages.canvas` and by phase `mover`. A portrait is looked at once, for the depths of its
head, for its light, for what expressions do to it, and for its head and the rest apart (`stages.apart`). With its
depths it turns (`stages.surface`; what it hides turns as an ellipsoid, `stages.moved`): the first guess. This network
looks at the guess and says how the places in it are wrong, what lies beside the head, and where neither helps it
paints; another looks closely at how these are laid over one another (`stages.networks.blend`). Places are looked up,
not drawn: so a small network moves sharp details.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from stages.apart import taken_apart
from stages.config import HeadConfig, ModelConfig
from stages.moved import bounded, cells, grown, looked_up, looked_up_at, shifts
from stages.networks.blend import NUM_LAYERS, Blend
from stages.networks.depths import Depths
from stages.networks.expressions import Expressions, seen_at
from stages.networks.layers import ResnetBlock
from stages.networks.light import MAX_BRIGHTENING, Light, brightened
from stages.networks.vae import fold, unfold
from stages.surface import Turned, covered, turned

SPLIT = (2, 2, 3, 3, 3, 1, 1)
"""Channels that the network says per place: shifts of the head, of what is beside it, paint, how much of each, tint,
how much more of what light does, and whether what is beside the head is the body."""
NUM_SAID = sum(SPLIT)
NUM_GUESSED = 12
"""Channels of the guess beside pictures: shift, whether the portrait shows it, directions before and after,
brightening."""
FINER = 2
"""Cells that the network speaks of, along one cell of its guess: an iris moves by less than the latter."""
FIRST_SHARES = (4.0, 0.0, -3.0)
"""Logits of head, beside it and paint before anything is learned."""
BODY_WIDTH = 64
MAX_MORE = 10.0
"""Light does no more than this many times more than it is thought to, nor the opposite."""
MAX_SHIFT = 1.0
"""Half picture sides; no place is looked up farther from where the guess has it."""


@dataclass(frozen=True)
class Looked:
    """What a look at a portrait has found, for all frames."""

    depths: Tensor
    """(5, h, h) as `stages.networks.depths` gives them."""
    fields: Tensor
    """(fields, told, g, g) as `stages.networks.expressions` gives them."""
    light: Tensor
    """(3, m, m) as `stages.networks.light` gives it."""
    apart: Tensor
    """(2, 3, s, s) the portrait's head, and the portrait without it, as `stages.apart` gives them."""

    def half(self) -> Looked:
        """As it is kept between chunks."""
        return Looked(self.depths.half(), self.fields.half(), self.light.half(), self.apart.half())


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
    """(n, 3, g, g) what is added to them or taken, where light does more than `gain` says."""
    gain: Tensor
    """(n, 3, g, g) how many times as bright the head is here, since it faces another way than in the portrait."""
    is_body: Tensor
    """(n, 1, g, g) logits of moving as the body does, for what is beside the head."""
    cover: Tensor
    """(n, 1, g, g) how much of a cell the head covers, turned as a solid."""


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
        self.body_in, self.body_out = nn.Linear(6 * num_keypoints, BODY_WIDTH), nn.Linear(BODY_WIDTH, 2)
        self.conv_in = nn.Conv2d(12 * patch**2 + NUM_GUESSED, fine, 3, stride=2, padding=1)
        self.down = ResnetBlock(fine, fine, width, num_groups)
        self.halve = nn.Conv2d(fine, coarse, 3, stride=2, padding=1)
        self.middle = nn.ModuleList([ResnetBlock(coarse, coarse, width, num_groups) for _ in range(2)])
        self.up = ResnetBlock(coarse + fine, fine, width, num_groups)
        self.norm_out = nn.GroupNorm(num_groups, fine)
        self.conv_out = nn.Conv2d(fine, (2 * FINER) ** 2 * NUM_SAID, 3, padding=1)
        for parameter in (*self.conv_out.parameters(), *self.body_out.parameters()):
            nn.init.zeros_(parameter)
        self.depths = Depths(config)
        self.expressions = Expressions(config)
        self.light = Light(config)
        self.blend = Blend()

    def look(self, portrait: Tensor, start: Tensor, own_tokens: Tensor) -> Looked:
        """At a portrait (3, s, s) in [0, 1] with its keypoints (K, 3) and tokens (T, D)."""
        portrait, start = portrait.float(), bounded(start)
        depths = self.depths(portrait[None], start[None])
        light = self.light(portrait[None], start[None], depths)[0]
        fields = self.expressions.fields(portrait, start, own_tokens)
        return Looked(depths[0], fields, light, taken_apart(portrait, depths[0, 1]))

    def forward(
        self,
        drawn: Tensor,
        portrait: Tensor,
        start: Tensor,
        end: Tensor,
        own_tokens: Tensor,
        tokens: Tensor,
        looked: Looked,
    ) -> Tensor:
        """drawn (n, 3, s, s) keypoints in [0, 1]; the portrait's keypoints (K, 3) and tokens (T, D), and the frames'
        (n, K, 3) and (n, T, D); what `look` found. Places are calculated in fp32 whatever the weights are."""
        said = self.say(drawn, portrait, start, end, own_tokens, tokens, looked)
        return composed(looked.apart.float(), said, self.blend)

    def say(
        self,
        drawn: Tensor,
        portrait: Tensor,
        start: Tensor,
        end: Tensor,
        own_tokens: Tensor,
        tokens: Tensor,
        looked: Looked,
    ) -> Said:
        """What `forward` composes its pictures of, from the same."""
        portrait, start, end = portrait.float(), bounded(start), bounded(end)
        guess, found = first_guess(
            looked.depths.float(), start, end, portrait.shape[-1] // self.head.grid_px, self.head
        )
        brightening = brightened(looked.light, found.normals)
        guessed = looked_up(portrait, guess) * grown(brightening.exp(), portrait.shape[-1])
        still = torch.stack([portrait, looked.apart[1].float()]).flatten(0, 1)[None]
        own, flat = own_tokens.float().expand_as(tokens).flatten(1), tokens.float().flatten(1)
        given = torch.cat([own, flat, start.expand_as(end).flatten(1), end.flatten(1)], 1)
        told = self.expressions.told(looked.fields, own_tokens, tokens)
        guessed_at = torch.cat(
            [rearrange(guess, "n h w c -> n c h w"), found.seen[:, None], found.normals, brightening], 1
        )
        said = self._said((drawn, guessed, still), guessed_at, given)
        depth, is_head, _, _, thickness = looked.depths.float()
        cover = covered(depth, thickness, is_head, start, end, guess.shape[1])
        return meant(guess, brightening, said, told, start, self.body_shift(start, end), cover)

    def body_shift(self, start: Tensor, end: Tensor) -> Tensor:
        """(n, 2) how far away lies the place in the portrait that any cell of the body shows, from the portrait's
        keypoints (K, 3) and the frames' (n, K, 3)."""
        # In fp32 also where networks train in mixed precision: bfloat16 is off by a part of a pixel.
        with torch.autocast(end.device.type, enabled=False):
            own = start.expand_as(end)
            x = torch.cat([own, end - own], 1).flatten(1)
            x = F.silu(F.linear(x, self.body_in.weight.float(), self.body_in.bias.float()))
            return MAX_SHIFT * torch.tanh(F.linear(x, self.body_out.weight.float(), self.body_out.bias.float()))

    def _said(self, shown: Sequence[Tensor], guessed_at: Tensor, given: Tensor) -> Tensor:
        """(n, NUM_SAID, g, g) in fp32, of pictures (n or 1, ..., s, s); g being `FINER` times the grid of `guessed_at`
        (n, NUM_GUESSED, h, h)."""
        dtype = self.conv_in.weight.dtype
        folded = (fold(part.to(dtype), self.head.grid_px) for part in shown)
        parts = [part.expand(len(given), -1, -1, -1) for part in (*folded, guessed_at.to(dtype))]
        picture = torch.cat(parts, 1)
        known = self.known(given.to(dtype))
        fine = self.down(F.silu(self.conv_in(picture)), known)
        coarse = self.halve(fine)
        for block in self.middle:
            coarse = block(coarse, known)
        wide = F.interpolate(coarse, size=fine.shape[-2:], mode="nearest")
        x = self.up(torch.cat([wide, fine], 1), known)
        return unfold(self.conv_out(F.silu(self.norm_out(x))), 2 * FINER).float()


def first_guess(depths: Tensor, start: Tensor, end: Tensor, side: int, head: HeadConfig) -> tuple[Tensor, Turned]:
    """(n, side, side, 2) how far from every cell of n frames lies the place in the portrait that it shows, and what of
    it is known by the portrait's depths (5, h, h); the rest turns as an ellipsoid."""
    depth, is_head, across, down, _ = depths
    towards = -(1 - across.square() - down.square()).clamp(min=0).sqrt()
    found = turned(depth, torch.stack([across, down, towards], -1), is_head > 0, start, end, side)
    return torch.where(found.seen[..., None] > 0, found.shift, shifts(start, end, side, head)), found


def meant(
    guess: Tensor,
    brightening: Tensor,
    said: Tensor,
    told: Tensor,
    start: Tensor,
    body_shift: Tensor,
    cover: Tensor,
) -> Said:
    """What the network's channels (n, NUM_SAID, g, g) mean, given the first guess (n, h, h, 2), what light does to it
    (n, 3, h, h), what `Expressions.told` says of the portrait, whose keypoints are `start`, how the body moves (n, 2),
    and what the head covers (n, h, h)."""
    head, beside, paint, shares, tint, more, is_body = said.split(SPLIT, dim=1)
    first = torch.tensor(FIRST_SHARES, device=said.device)[:, None, None]
    fine = rearrange(grown(rearrange(guess, "n h w c -> n c h w"), said.shape[-1]), "n c h w -> n h w c")
    at_head = fine + _shift(head)
    pulled, opened, colours = seen_at(told, cells(said.shape[-1], at_head) + at_head, start).split((2, 1, 3), dim=1)
    # Of the three shares, paint's is the last.
    shares = shares + first + F.pad(opened, (0, 0, 0, 0, 2, 0))
    paint = (paint + colours).sigmoid()
    more = more.clamp(-MAX_MORE, MAX_MORE)
    gain = (grown(brightening, said.shape[-1]) * (1 + more)).clamp(-MAX_BRIGHTENING, MAX_BRIGHTENING).exp()
    with_body = is_body.sigmoid() * rearrange(body_shift, "n c -> n c 1 1")
    return Said(
        at_head + rearrange(pulled, "n c h w -> n h w c"),
        rearrange(with_body, "n c h w -> n h w c") + _shift(beside),
        paint,
        shares,
        torch.tanh(tint),
        gain,
        is_body,
        grown(rearrange(cover, "n h w -> n 1 h w"), said.shape[-1]),
    )


def composed(apart: Tensor, said: Said, blend: Blend | None = None) -> Tensor:
    """(n, 3, s, s) in [0, 1]: the layers of a portrait taken apart (2, 3, s, s), by their shares, which `blend` may
    still correct."""
    side, shares = apart.shape[-1], said.shares
    pictures = layers(apart, said)
    if blend is not None:
        flat = rearrange(pictures, "n l c h w -> n (l c) h w")
        small = F.interpolate(flat, size=shares.shape[-2:], mode="bilinear")
        shares = blend(rearrange(small, "n (l c) h w -> n l c h w", l=NUM_LAYERS), shares, said.cover)
    # Shares are grown as logits: an outline then runs between cells.
    first, *others = zip(pictures.unbind(1), grown(shares, side).softmax(1).split(1, 1), strict=True)
    result = first[0] * first[1]
    for picture, share in others:
        result = torch.addcmul(result, picture, share)
    return result.clamp(0, 1)


def layers(apart: Tensor, said: Said) -> Tensor:
    """(n, 3, 3, s, s): of a portrait taken apart (2, 3, s, s) the head looked up where the head leads and lit, the rest
    where what is beside it does, and paint, all tinted."""
    side = apart.shape[-1]
    places = (rearrange(part, "n h w c -> n c h w") for part in (said.head, said.beside))
    # Grown at once, as that is what takes the time.
    wide = grown(torch.cat([*places, said.gain, said.paint, said.tint], 1), side)
    to_head, to_beside, gain, paint, tint = wide.split((2, 2, 3, 3, 3), dim=1)
    # Most of what is beside the head does not move: a dearer look would show nothing more.
    head, beside = looked_up_at(apart[0], to_head, "bicubic"), looked_up_at(apart[1], to_beside)
    return torch.stack([head * gain, beside, paint], 1) + tint[:, None]


def _shift(said: Tensor) -> Tensor:
    return rearrange(MAX_SHIFT * torch.tanh(said), "n c h w -> n h w c")
