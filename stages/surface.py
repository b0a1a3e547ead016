"""A head whose depth is known, turned: where in the portrait every cell of a frame is from, what cannot be seen, and
what the head covers.

Called by `stages.networks.mover`. The cells of a portrait's head (`stages.networks.depths`) are points in space: they
move as the keypoints do, and those nearest to the viewer are seen. Keypoints are (K, 3), places [-1, 1] across the
picture, depths in the same units away from the viewer and from the keypoints' mean.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange, reduce, repeat
from torch import Tensor
from torch.nn import functional as F

from stages.moved import cells, relative_turn

THICKNESS = 0.03
"""Points that lie this much behind the nearest one of a cell, in half picture sides, are still of the same surface."""
NUM_SLICES = 12
"""Into which a head is cut, from its nearest to its farthest point, to see what it covers when it is turned."""
MIN_FORESHORTENING = 0.05
"""Slices are not seen more from aside than this, in lengths of a slice's own."""
MIN_SLICE, MAX_LEVEL = 1e-3, 100.0
"""How thick a slice is at least, and how far away at most, in half picture sides."""


@dataclass(frozen=True)
class Turned:
    """What cells (g, g) of n frames show of a portrait's head."""

    shift: Tensor
    """(n, g, g, 2) how far away lies the place in the portrait that a cell shows, [-1, 1] across; 0 where none is."""
    seen: Tensor
    """(n, g, g) 1 where a cell shows a part of the head that the portrait shows too, and else 0."""
    normals: Tensor
    """(n, 6, g, g) where the surface faces in the portrait and in the frame, on which light depends: means of unit
    vectors, z < 0 towards the viewer, 0 where nothing is seen."""


def turned(depth: Tensor, facing: Tensor, is_head: Tensor, start: Tensor, end: Tensor, side: int) -> Turned:
    """The head with depths (h, h) and a surface that faces as unit normals `facing` (h, h, 3) say, where `is_head`
    (h, h) says so, turned from keypoints `start` (K, 3) to `end` (n, K, 3), in side x side cells."""
    # In fp32 also where networks train in mixed precision: bfloat16 is off by a pixel.
    with torch.autocast(depth.device.type, enabled=False):
        turn, scale = relative_turn(start, end)
        places = rearrange(cells(len(depth), depth), "h w c -> (h w) c")[is_head.flatten()]
        faced = facing[is_head]
        points = torch.cat([places - start.mean(0)[:2], depth[is_head][:, None]], 1)
        moved = torch.einsum("nij,pj->npi", turn, points) * rearrange(scale, "n -> n 1 1")
        there = moved[..., :2] + rearrange(end.mean(1)[:, :2], "n c -> n 1 c")
        told = torch.cat(
            [
                places - there,
                torch.ones_like(moved[..., :1]),
                repeat(faced, "p c -> n p c", n=len(end)),
                torch.einsum("nij,pj->npi", turn, faced),
            ],
            2,
        )
        mean = splatted(told, there, moved[..., 2], side)
    shift, seen, normals = mean.split((2, 1, 6), dim=1)
    return Turned(rearrange(shift, "n c h w -> n h w c"), seen[:, 0], normals)


def covered(depth: Tensor, thickness: Tensor, is_head: Tensor, start: Tensor, end: Tensor, side: int) -> Tensor:
    """(n, side, side) how much of every cell of n frames the head covers, 0 to 1. Where logits `is_head` (h, h) say so
    it begins at depths (h, h) and goes on for a thickness (h, h); it turns from keypoints `start` (K, 3) to `end`
    (n, K, 3). Seen from aside, it also covers what the portrait does not show of it: its back."""
    # In fp32 also where networks train in mixed precision: bfloat16 is off by a pixel.
    with torch.autocast(depth.device.type, enabled=False):
        turn, scale = relative_turn(start, end)
        inside, levels = _slices(depth, thickness, is_head)
        # A slice stays flat: where it lies in a frame is an affine map.
        aside = torch.einsum("ni,k->nki", scale[:, None] * turn[:, :2, 2], levels)
        away = cells(side, depth) - rearrange(end.mean(1)[:, None, :2] + aside, "n k c -> n k 1 1 c")
        back = _inverse(turn[:, :2, :2]) / rearrange(scale, "n -> n 1 1")
        places = torch.einsum("nij,nkhwj->nkhwi", back, away) + start.mean(0)[:2]
        grid = rearrange(places, "n k h w c -> (n k) h w c")
        slices = repeat(inside, "k h w -> (n k) 1 h w", n=len(end))
        found = F.grid_sample(slices, grid, padding_mode="zeros", align_corners=False)
        return reduce(found, "(n k) 1 h w -> n h w", "max", n=len(end))


def _slices(depth: Tensor, thickness: Tensor, is_head: Tensor) -> tuple[Tensor, Tensor]:
    """(NUM_SLICES, h, h) what of the head lies at each of the levels (NUM_SLICES,), and these."""
    nearest = torch.where(is_head > 0, depth, MAX_LEVEL).amin().clamp(-MAX_LEVEL, MAX_LEVEL)
    farthest = torch.where(is_head > 0, depth + thickness, -MAX_LEVEL).amax().clamp(-MAX_LEVEL, MAX_LEVEL)
    slice_depth = ((farthest - nearest) / (NUM_SLICES + 1)).clamp(min=MIN_SLICE)
    levels = nearest + slice_depth * torch.arange(1, NUM_SLICES + 1, device=depth.device)
    level = rearrange(levels, "k -> k 1 1")
    within = torch.minimum(level - depth, depth + thickness - level) / slice_depth + 0.5
    return within.clamp(0, 1) * is_head.sigmoid(), levels


def _inverse(linear: Tensor) -> Tensor:
    """Of matrices (n, 2, 2), which flatten no more than by MIN_FORESHORTENING."""
    (a, b), (c, d) = (row.unbind(-1) for row in linear.unbind(-2))
    size = a * d - b * c
    size = torch.where(size < 0, -1.0, 1.0) * size.abs().clamp(min=MIN_FORESHORTENING)
    return rearrange(torch.stack([d, -b, -c, a]) / size, "(i j) n -> n i j", i=2)


def directions(depth: Tensor) -> Tensor:
    """Unit normals (h, h, 3) towards the viewer, of depths (h, h)."""
    down, right = torch.gradient(depth, spacing=2 / len(depth))
    slope = torch.stack([right, down, -torch.ones_like(depth)], -1)
    return slope / slope.norm(dim=-1, keepdim=True)


def splatted(told: Tensor, there: Tensor, depth: Tensor, side: int) -> Tensor:
    """(n, c, side, side): of points with numbers `told` (n, p, c) at places `there` (n, p, 2), the mean in every cell
    of those that are nearest to the viewer; 0 in cells without any."""
    column, row = ((there + 1) * side / 2).floor().long().unbind(-1)
    inside = (column >= 0) & (column < side) & (row >= 0) & (row < side)
    cell = torch.where(inside, row * side + column, side**2)
    # One cell more, for points off the picture.
    empty = depth.new_full((len(depth), side**2 + 1), torch.inf)
    nearest = empty.scatter_reduce(1, cell, depth.detach(), "amin")
    is_front = (depth <= nearest.gather(1, cell) + THICKNESS).to(told)
    count = torch.zeros_like(empty).scatter_add(1, cell, is_front)
    cell_of_number = repeat(cell, "n p -> n p c", c=told.shape[2])
    total = told.new_zeros(*empty.shape, told.shape[2]).scatter_add(1, cell_of_number, told * is_front[..., None])
    mean = (total / count.clamp(min=1)[..., None])[:, :-1]
    return rearrange(mean, "n (h w) c -> n c h w", h=side)
