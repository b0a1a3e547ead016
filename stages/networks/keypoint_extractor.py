"""Keypoint extractor: a face picture to implicit 3D keypoints and the head's pose (ConvNeXt V2, spec section 6.1).

Called by the motion stage on every frame; `stages.keypoints` turns its raw output into keypoints. The tensor names are
the official ones without their leading `detector.`; hence `stages` here are a ConvNeXt's, not the pipeline's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from einops import reduce
from torch import Tensor, nn
from torch.nn import functional as F

from stages.config import KeypointConfig
from stages.networks.convnext import NORM_EPS, Block, ChannelNorm
from stages.networks.pinpoint import Pinpoint
from stages.networks.upright import Upright, upright


@dataclass(frozen=True)
class RawPose:
    """The network's heads for n pictures, before any interpretation."""

    keypoints: Tensor
    """(n, K · 3)."""
    pitch: Tensor
    """(n, bins) logits, like `yaw` and `roll`."""
    yaw: Tensor
    roll: Tensor
    translation: Tensor
    """(n, 3)."""
    scale: Tensor
    """(n, 1)."""
    heat: Tensor | None = None
    """(n, K, h, w) logits of where each keypoint lies, of extractors with a `Pinpoint`."""
    turn: Tensor | None = None
    """(n, 3) degrees of pitch, yaw and roll, of extractors that look again (`stages.networks.upright`): these count."""


# The angle logits' bins are 3 degrees wide; the first is centred on -97.5.
DEGREES_PER_BIN = 3.0
FIRST_BIN_DEGREES = -97.5


def degrees_from_logits(logits: Tensor) -> Tensor:
    """(n, bins) logits to (n,) degrees: the expected bin (section 6.2)."""
    bins = torch.arange(logits.shape[-1], dtype=logits.dtype, device=logits.device)
    return (logits.softmax(dim=-1) * bins).sum(dim=-1) * DEGREES_PER_BIN + FIRST_BIN_DEGREES


def degrees_of(raw: RawPose) -> Tensor:
    """(n, 3) degrees: pitch, yaw, roll."""
    if raw.turn is not None:
        return raw.turn
    return torch.stack([degrees_from_logits(logits) for logits in (raw.pitch, raw.yaw, raw.roll)], dim=-1)


def _downsample_layers(dims: tuple[int, ...]) -> nn.ModuleList:
    stem = nn.Sequential(nn.Conv2d(3, dims[0], 4, stride=4), ChannelNorm(dims[0]))
    halvings = [
        nn.Sequential(ChannelNorm(narrow), nn.Conv2d(narrow, wide, 2, stride=2)) for narrow, wide in pairwise(dims)
    ]
    return nn.ModuleList([stem, *halvings])


class KeypointExtractor(nn.Module):
    """Pictures (n, 3, image_px, image_px) in [0, 1] to a RawPose of n."""

    def __init__(self, config: KeypointConfig):
        super().__init__()
        width, num_bins = config.dims[-1], config.num_angle_bins
        self.downsample_layers = _downsample_layers(config.dims)
        depths = zip(config.dims, config.depths, strict=True)
        self.stages = nn.ModuleList([nn.Sequential(*(Block(dim) for _ in range(depth))) for dim, depth in depths])
        self.gather = nn.Conv2d(width, width, config.gathered_cells) if config.gathered_cells else None
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        fine = config.fine_channels
        self.pinpoint = Pinpoint(config.dims, fine, config.num_keypoints) if fine else None
        self.upright = Upright(config) if config.upright_channels else None
        self.upright_px = config.upright_px
        self.fc_kp = nn.Linear(width, 3 * config.num_keypoints)
        self.fc_scale = nn.Linear(width, 1)
        self.fc_pitch = nn.Linear(width, num_bins)
        self.fc_yaw = nn.Linear(width, num_bins)
        self.fc_roll = nn.Linear(width, num_bins)
        self.fc_t = nn.Linear(width, 3)

    def trunk(self) -> list[nn.Module]:
        """What may run in bfloat16: all up to the last maps, and the heat. That moves the bundled model's angles by
        0.01 degrees, 0.05 at most; `gather` and what follows would move them by 0.25 and stay in fp32 always."""
        more = [part for part in (self.pinpoint, self.upright) if part is not None]
        return [self.downsample_layers, self.stages, *(layer for part in more for layer in part.trunk())]

    def forward(self, images: Tensor) -> RawPose:
        raw = self.first_look(images)
        return raw if self.upright is None else replace(raw, turn=self._turn(self.upright, images, raw))

    def first_look(self, images: Tensor) -> RawPose:
        """What is found in whole pictures; all there is in extractors that do not look again."""
        dtype = next(self.downsample_layers.parameters()).dtype
        # The mean of two by two, which torch's avg_pool2d takes five times as long for.
        halved = images if self.pinpoint is None else F.interpolate(images, scale_factor=0.5, mode="bilinear")
        fine, x = images.to(dtype), halved.to(dtype)
        maps = []
        for downsample, blocks in zip(self.downsample_layers, self.stages, strict=True):
            x = blocks(downsample(x))
            maps.append(x)
        heat = None if self.pinpoint is None else self.pinpoint.look(fine, maps)
        # Also where networks train in mixed precision.
        with torch.autocast(x.device.type, enabled=False):
            return self._heads(x.float(), None if heat is None else heat.float())

    def _turn(self, again: Upright, images: Tensor, raw: RawPose) -> Tensor:
        """(n, 3) degrees, from a second look at where the head is."""
        roll = degrees_from_logits(raw.roll).detach()
        place = raw.translation[:, :2].detach(), raw.scale[:, 0].detach()
        turn = again(upright(images * 2 - 1, *place, roll, self.upright_px))
        return turn + F.pad(roll[:, None], (2, 0))

    def _heads(self, last: Tensor, heat: Tensor | None) -> RawPose:
        x = self.norm(reduce(last if self.gather is None else self.gather(last), "n c h w -> n c", "mean"))
        if self.pinpoint is not None:
            x = self.pinpoint(x, heat)
        return RawPose(
            keypoints=self.fc_kp(x),
            pitch=self.fc_pitch(x),
            yaw=self.fc_yaw(x),
            roll=self.fc_roll(x),
            translation=self.fc_t(x),
            scale=self.fc_scale(x),
            heat=heat,
        )
