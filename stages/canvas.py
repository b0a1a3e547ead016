"""Canvases: all that the pose guider sees of a frame. Called by the denoise stage, once per new chunk, and by training.

As in the paper a canvas is the drawn keypoints. A small model's canvas also shows the portrait (`stages.moved`).
"""

from __future__ import annotations

import torch
from einops import repeat
from torch import Tensor

from stages.config import ModelConfig
from stages.keypoints import draw
from stages.moved import moved


def canvases(
    keypoints: Tensor, portrait: Tensor | None, portrait_keypoints: Tensor | None, config: ModelConfig
) -> Tensor:
    """(n, 3 or 9, size, size) in [0, 1], on the keypoints' device, of keypoints (n, K, 3).

    Channels: the drawn keypoints; where `config.pose_guider.shows_portrait`, then the portrait (3, size, size) in
    [0, 1] as it moves from its own keypoints (K, 3) to these, and the portrait itself. Otherwise both may be None.
    """
    drawn = draw(keypoints, config.size_px, config.keypoints)
    if not config.pose_guider.shows_portrait:
        return drawn
    assert portrait is not None and portrait_keypoints is not None, "this model's canvases show the portrait"
    turned = moved(portrait, portrait_keypoints, keypoints, config.pose_guider.head)
    return torch.cat([drawn, turned, repeat(portrait, "c h w -> n c h w", n=len(keypoints))], dim=1)
