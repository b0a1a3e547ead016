"""Where a picture matters: loss weights from boxes. Called by the phases."""

from __future__ import annotations

import torch
from torch import Tensor


def box_mask(boxes: Tensor, size_px: int, side: int) -> Tensor:
    """(n, k, side, side) of 0 and 1: which cells of a picture `size_px` wide lie in boxes (n, k, 4) of its pixels.

    A cell counts when its middle lies inside, which is nearest-neighbour scaling of the full mask.
    """
    middle = (torch.arange(side, device=boxes.device) + 0.5) * size_px / side
    x1, y1, x2, y2 = boxes[..., None].unbind(-2)
    across = (middle >= x1) & (middle < x2)
    down = (middle >= y1) & (middle < y2)
    return (down[..., :, None] & across[..., None, :]).float()


def region_weights(boxes: Tensor, size_px: int, side: int, face_weight: float, parts_weight: float) -> Tensor:
    """(n, 1, side, side): 1, plus `face_weight` inside the face, plus `parts_weight` inside eyes and mouth.

    boxes (n, 4, 4): face, left eye, right eye, mouth (training specification, section 2).
    """
    masks = box_mask(boxes, size_px, side)
    face, parts = masks[:, :1], masks[:, 1:].amax(1, keepdim=True)
    return 1 + face_weight * face + parts_weight * parts


def place_weights(parts: Tensor, size_px: int) -> Tensor:
    """(n, 1, size, size): 1 on the middles of boxes (n, k, 4), falling off softly with about their own size."""
    parts = parts.float()
    centre = (parts[..., :2] + parts[..., 2:]) / 2
    width = (parts[..., 2:] - parts[..., :2]).amax(-1, keepdim=True).clamp(min=4) * 0.6
    line = torch.arange(size_px, device=parts.device) + 0.5
    x, y = (torch.exp(-0.5 * ((line - centre[..., axis : axis + 1]) / width) ** 2) for axis in (0, 1))
    return (y[..., :, None] * x[..., None, :]).amax(1, keepdim=True)
