"""Apart: a portrait's head without what is around it, and what is around it without the head.

Called by `stages.networks.mover`, once for a portrait. When a head moves, both show what they have hidden of each
other: a backdrop that goes on behind the head, hair that goes on around it. Each is filled by the colours that are
nearest, from farther around where more is hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from stages.moved import grown

HEAD_MARGIN_PX, BESIDE_MARGIN_PX = 1, 3
"""Pixels along the outline, which is not known exactly and has colours of both, that are not taken for the head's, and
for what is beside it."""
SURE_SHARE = 0.25
"""Of a square's pixels: where so many are known, their mean counts in full."""
SMALLEST = 1e-6


def taken_apart(portrait: Tensor, is_head: Tensor) -> Tensor:
    """(2, 3, s, s) of a portrait (3, s, s) whose head is where the logits `is_head` (h, h) are above 0: the head going
    on over the whole picture, and what is beside it likewise."""
    logits = grown(is_head.float()[None, None], portrait.shape[-1])
    known = torch.cat([_least(logits, HEAD_MARGIN_PX) > 0, _least(-logits, BESIDE_MARGIN_PX) > 0]).to(portrait)
    return filled(portrait.expand(2, -1, -1, -1), known)


def filled(pictures: Tensor, known: Tensor) -> Tensor:
    """(n, 3, s, s) pictures as they are where `known` (n, 1, s, s) is 1, and where it is 0 filled from around; as they
    are everywhere if nothing at all is known."""
    known = known + (known.amax((1, 2, 3), keepdim=True) == 0).to(known)
    levels = [(pictures * known, known)]
    while levels[-1][0].shape[-1] > 1:
        colours, known = (F.avg_pool2d(part, 2, ceil_mode=True) for part in levels[-1])
        share = (known / SURE_SHARE).clamp(max=1)
        levels.append((colours * share / known.clamp(min=SMALLEST), share))
    result = torch.zeros_like(levels[-1][0])
    for colours, known in reversed(levels):
        result = colours + (1 - known) * grown(result, colours.shape[-1])
    return result


def _least(x: Tensor, margin: int) -> Tensor:
    return -F.max_pool2d(-x, 2 * margin + 1, stride=1, padding=margin)
