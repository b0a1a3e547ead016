"""Canvases: all that the pose guider sees of a frame. Called by the denoise stage, once per new chunk, and by training.

As in the paper a canvas is the drawn keypoints. A small model's canvas also shows the portrait, unmoved and moved: as a
turning head (`stages.moved`) or, better, as a network moves it (`stages.networks.mover`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import repeat
from torch import Tensor

from stages.config import ModelConfig
from stages.keypoints import draw
from stages.moved import moved
from stages.networks.mover import Mover

MOVED = slice(3, 6)
"""Channels of a canvas that show the moved portrait, where it does."""


@dataclass(frozen=True)
class ShownPortrait:
    """What canvases show besides keypoints."""

    picture: Tensor
    """(3, size, size) in [0, 1]."""
    keypoints: Tensor
    """(K, 3)."""
    tokens: Tensor
    """(T, D) motion tokens."""


def canvases(
    keypoints: Tensor,
    tokens: Tensor,
    portrait: ShownPortrait | None,
    mover: Mover | None,
    config: ModelConfig,
    turned: Tensor | None = None,
) -> Tensor:
    """(n, 3 or 9, size, size) in [0, 1], on the keypoints' device, of keypoints (n, K, 3) and motion tokens (n, T, D).

    Channels: the drawn keypoints; where `config.pose_guider.shows_portrait`, then the portrait as it moves from its own
    keypoints to these (`turned` (n, 3, size, size), where somebody knows it), and the portrait itself. Otherwise no
    portrait is needed, and tokens are not looked at.
    """
    drawn = draw(keypoints, config.size_px, config.keypoints)
    if not config.pose_guider.shows_portrait:
        return drawn
    assert portrait is not None, "this model's canvases show the portrait"
    if turned is None:
        turned = _turned(drawn, keypoints, tokens, portrait, mover, config)
    return torch.cat([drawn, turned, repeat(portrait.picture, "c h w -> n c h w", n=len(keypoints))], dim=1)


def _turned(
    drawn: Tensor, keypoints: Tensor, tokens: Tensor, portrait: ShownPortrait, mover: Mover | None, config: ModelConfig
) -> Tensor:
    if mover is None:
        return moved(portrait.picture, portrait.keypoints, keypoints, config.pose_guider.head)
    # Rounded as where the motion stage has moved it.
    looked = mover.look(portrait.picture, portrait.keypoints, portrait.tokens).half()
    return mover(drawn, portrait.picture, portrait.keypoints, keypoints, portrait.tokens, tokens, looked).half().float()
