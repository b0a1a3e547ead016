"""A head whose depth is known, turned: where in the portrait every cell of a frame is from, and what cannot be seen.

Called by `stages.networks.mover`. The cells of a portrait's head (`stages.networks.depths`) are points in space: they
move as the keypoints do, and those nearest to the viewer are seen. Keypoints are (K, 3), places [-1, 1] across the
picture, depths in the same units away from the viewer and from the keypoints' mean.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange, repeat
from torch import Tensor

from stages.moved import cells, relative_turn

THICKNESS = 0.03
"""Points that lie this much behind the nearest one of a cell, in half picture sides, are still of the same surface."""


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
