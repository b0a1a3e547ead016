"""The portrait as its keypoints move it: a picture that is nearly the answer, so that a small model has less to draw.

A denoiser of a few million weights cannot learn from attention alone to move a face by pixels. So the small model's
pose canvas (`stages.canvas`, the caller) shows the portrait on an ellipsoid that turns as the keypoints turn. What is
hidden, behind the head or inside the mouth, and every expression is left to others. Keypoints are (K, 3) in the
picture, [-1, 1] across, z away from the viewer; any values, also of a face off the picture, give finite pictures.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from stages.config import HeadConfig

MAX_PLACE = 100.0
"""Keypoints farther out, in half picture sides, are taken as this far: their squares stay finite."""
MIN_SIZE = 1e-3
"""Keypoints nearer to one another, in half picture sides, have no direction and count as this far apart."""
SCALES = (0.05, 20.0)
"""How much smaller or larger than in the portrait a head can be shown."""


def moved(portrait: Tensor, start: Tensor, end: Tensor, head: HeadConfig) -> Tensor:
    """The portrait (3, s, s) as it looks with keypoints `end` (n, K, 3) instead of `start` (K, 3); (n, 3, s, s)."""
    coarse = shifts(bounded(start), bounded(end), max(portrait.shape[-1] // head.grid_px, 1), head)
    return looked_up(portrait.float(), coarse)


def looked_up(portrait: Tensor, coarse: Tensor) -> Tensor:
    """(n, 3, s, s): what a portrait (3, s, s) has as far away as `coarse` (n, g, g, 2) says, [-1, 1] across."""
    return looked_up_at(portrait, grown(rearrange(coarse, "n h w c -> n c h w"), portrait.shape[-1]))


def looked_up_at(portrait: Tensor, shift: Tensor, mode: str = "bilinear") -> Tensor:
    """The same with a shift (n, 2, s, s) for every pixel. Between pixels `bicubic` keeps more of what is fine, and may
    overshoot."""
    across, down = cells(portrait.shape[-1], portrait).unbind(-1)
    grid = torch.stack([across + shift[:, 0], down + shift[:, 1]], -1)
    pictures = portrait[None].expand(len(shift), -1, -1, -1)
    return F.grid_sample(pictures, grid, mode=mode, padding_mode="border", align_corners=False)


def grown(x: Tensor, side: int) -> Tensor:
    """(n, c, g, g) to (n, c, side, side), linearly between cells."""
    # Contiguous, as torch takes four times as long for channels that lie together.
    return F.interpolate(x.contiguous(), size=(side, side), mode="bilinear")


def bounded(keypoints: Tensor) -> Tensor:
    """Keypoints in fp32 that can be calculated with."""
    return keypoints.float().nan_to_num().clamp(-MAX_PLACE, MAX_PLACE)


def cells(side: int, like: Tensor) -> Tensor:
    """(side, side, 2): x and y of the middles of a picture's cells, [-1, 1] across, on the device of `like`."""
    line = (torch.arange(side, dtype=torch.float32, device=like.device) + 0.5) * 2 / side - 1
    return torch.stack(torch.meshgrid(line, line, indexing="xy"), -1)


def spread(keypoints: Tensor) -> Tensor:
    """(...) the root mean square distance of keypoints (..., K, 3) from their middle."""
    away = keypoints - keypoints.mean(-2, keepdim=True)
    return away.square().sum(-1).mean(-1).sqrt().clamp(min=MIN_SIZE)


def relative_turn(start: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """Rotations (n, 3, 3) and scales (n,) that lead from keypoints start (K, 3) to end (n, K, 3): p → s · R @ p, about
    their means, by least squares (Umeyama)."""
    a, b = start - start.mean(0), end - end.mean(1, keepdim=True)
    u, size, vh = torch.linalg.svd(torch.einsum("nki,kj->nij", b, a))
    sign = torch.ones_like(size)
    sign[:, 2] = torch.linalg.det(u @ vh)
    turn = u @ (sign[..., None] * vh)
    return turn, ((size * sign).sum(1) / (a * a).sum().clamp(min=MIN_SIZE**2)).clamp(*SCALES)


def shifts(start: Tensor, end: Tensor, side: int, head: HeadConfig) -> Tensor:
    """(n, side, side, 2): how far from every cell of n pictures lies the place in the portrait that it shows, [-1, 1]
    across. start (K, 3) are the portrait's keypoints, end (n, K, 3) those of the pictures. Away from the head: 0."""
    # In fp32 also where networks train in mixed precision: bfloat16 is off by a pixel.
    with torch.autocast(start.device.type, enabled=False):
        return _shifts(start, end, side, head)


def _shifts(start: Tensor, end: Tensor, side: int, head: HeadConfig) -> Tensor:
    turn, scale = relative_turn(start, end)
    unit = spread(start)
    offset, radii = (torch.tensor(part, device=start.device) * unit for part in (head.centre, head.radii))
    middle = end.mean(1) + scale[:, None] * torch.einsum("nij,j->ni", turn, offset)
    grid = cells(side, start)
    ray = (grid - rearrange(middle[:, :2], "n c -> n 1 1 c")) / rearrange(scale, "n -> n 1 1 1")
    local, reach = _front(ray, turn, radii)
    shown = (start.mean(0) + offset)[:2] + local
    near = torch.sigmoid((1 + head.margin - reach) / head.softness)
    return near[..., None] * (shown - grid)


def _front(ray: Tensor, turn: Tensor, radii: Tensor) -> tuple[Tensor, Tensor]:
    """Where rays (n, h, w, 2) along z meet the ellipsoid first, x and y in the portrait's axes (n, h, w, 2), and how
    far from its middle (n, h, w) they pass: 1 on the outline. Rays that miss it stay where they come closest."""
    into = turn / radii
    a, b = torch.einsum("nhwi,nij->nhwj", ray, into[:, :2]), into[:, 2]
    bb = rearrange(b.square().sum(1), "n -> n 1 1")
    ab = torch.einsum("nhwj,nj->nhw", a, b)
    closest = a.square().sum(-1) - ab.square() / bb
    z = -ab / bb - ((1 - closest).clamp(min=0) / bb).sqrt()
    point = torch.cat([ray, z[..., None]], -1)
    return torch.einsum("nhwi,nij->nhwj", point, turn[..., :2]), closest.clamp(min=0).sqrt()
