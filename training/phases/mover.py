"""Phase `mover`: the network that moves the portrait (`stages.networks.mover`), for models that start from nothing.

The drawn world knows where everything in its pictures is from (`training.places`), and what it knows is learned in a
tenth of the steps that pictures alone would take: from these a network first learns to lay half of one guess over half
of another. Pictures teach the rest, expressions above all.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional as F

from stages.config import ModelConfig
from stages.errors import BadConfig
from stages.images import signed
from stages.keypoints import draw as draw_keypoints
from stages.networks.mover import Said, composed
from stages.networks.pose_guider import PoseGuider
from training.clips import Batch
from training.identity import sample_identity
from training.motion import from_array
from training.phases.animation import AnimationPhase
from training.phases.phase import Draws, Update
from training.places import BODY, HEAD, INSIDE, NECK, sources
from training.recipes import MoverConfig
from training.regions import region_weights

NETWORKS = ("keypoint_extractor", "motion_encoder", "pose_guider")
UNKNOWN = -100
"""Of cells of which nobody says which share shall show them; what `F.cross_entropy` ignores."""
AT_HEAD, BESIDE, PAINTED = range(3)


class MoverPhase(AnimationPhase):
    """Trains the mover inside `pose_guider` on the target frames of a batch."""

    config: MoverConfig

    def __init__(
        self, model: ModelConfig, config: MoverConfig, networks: dict[str, nn.Module], perceptual: nn.Module | None
    ):
        if not model.pose_guider.mover_channels:
            raise BadConfig(f"phase mover: {model.name} has none: leave it out or set model.pose_guider.mover_channels")
        super().__init__(model, config, networks)
        self.side = model.size_px // model.pose_guider.head.grid_px
        self.perceptual = None if perceptual is None else perceptual.requires_grad_(False)

    def forward(self, batch: Batch, draw: Draws, step: int, index: int, carry: Any) -> Update:
        flat = signed(rearrange(batch.pixels, "b f h w c -> (b f) h w c")).to(self.device)
        images = rearrange(flat, "(b f) c h w -> b f c h w", b=len(batch.pixels))
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            keypoints = self._keypoints(batch, flat, draw)
            tokens = self._tokens(batch, images, keypoints, draw)
        said = [self._say(*sample) for sample in zip(images, keypoints, tokens, strict=True)]
        loss, metrics = torch.zeros((), device=self.device), dict[str, Tensor]()
        if batch.people is not None and (batch.people >= 0).all():
            loss, metrics = place_loss(said, batch, images / 2 + 0.5, self._weights(batch, self.side))
        if self.config.picture_weight:
            pictures, errors = self._picture_loss(said, batch, images)
            loss, metrics = loss + self.config.picture_weight * pictures, metrics | errors
        return Update(loss, metrics)

    def _say(self, pictures: Tensor, keypoints: Tensor, tokens: Tensor) -> Said:
        """One sample's answers: pictures (1 + f, 3, s, s) in [-1, 1], the first being the portrait."""
        mover = self.network("pose_guider", PoseGuider).mover
        assert mover is not None
        drawn = draw_keypoints(keypoints[1:], self.model.size_px, self.model.keypoints)
        return mover.say(drawn, pictures[0] / 2 + 0.5, keypoints[0], keypoints[1:], tokens[0], tokens[1:])

    def _weights(self, batch: Batch, side: int) -> Tensor:
        """(b · f, 1, side, side) of the target frames' cells: face, and eyes and mouth more."""
        boxes = rearrange(torch.from_numpy(batch.boxes[:, 1:]).to(self.device), "b f k c -> (b f) k c")
        return region_weights(boxes, self.model.size_px, side, self.config.face_weight)

    def _picture_loss(self, said: list[Said], batch: Batch, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Squared, absolute and perceptual error of the moved portraits, weighted in face, eyes and mouth."""
        portraits = images[:, 0] / 2 + 0.5
        moved = torch.cat([composed(portrait, one) for portrait, one in zip(portraits, said, strict=True)]) * 2 - 1
        target = rearrange(images[:, 1:], "b f c h w -> (b f) c h w")
        weights = self._weights(batch, self.model.size_px)
        error = moved - target
        loss = ((error.square() + self.config.absolute_weight * error.abs()) * weights).mean()
        metrics = {"psnr_db": 10 * torch.log10(4 / F.mse_loss(moved.detach(), target))}
        if self.perceptual is not None:
            distance = self.perceptual(moved, target).mean()
            loss, metrics["perceptual"] = loss + self.config.perceptual_weight * distance, distance.detach()
        return loss, metrics


def place_loss(said: list[Said], batch: Batch, images: Tensor, weights: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Errors of places (in cells), of shares and of paint; images (b, 1 + f, 3, s, s) in [0, 1]. The truth is asked for
    in the cells of `weights` (b · f, 1, g, g), over which what is said more finely is averaged."""
    side = weights.shape[-1]
    truth = [true_places(batch, index, side) for index in range(len(said))]
    stacked = (np.concatenate(part) for part in zip(*truth, strict=True))
    shift, kinds, shown_by = (torch.from_numpy(part).to(images.device) for part in stacked)
    head, beside = (
        in_cells([rearrange(getattr(one, name), "n h w c -> n c h w") for one in said], side)
        for name in ("head", "beside")
    )
    weights = rearrange(weights, "n 1 h w -> n h w")
    head_error = cells_off(head, shift, weights * (kinds == HEAD))
    beside_error = cells_off(beside, shift, weights * (shown_by == BESIDE))
    shares = in_cells([one.shares for one in said], side)
    wrong = F.cross_entropy(shares, shown_by, ignore_index=UNKNOWN, reduction="none")
    share_error = (wrong * weights).sum() / (weights * (shown_by != UNKNOWN)).sum().clamp(min=1)
    paint = torch.cat([one.paint for one in said])
    colours = F.adaptive_avg_pool2d(rearrange(images[:, 1:], "b f c h w -> (b f) c h w"), paint.shape[-1])
    paint_error = F.l1_loss(paint, colours)
    metrics = {"head_cells": head_error, "beside_cells": beside_error, "shares": share_error, "paint": paint_error}
    loss = head_error + beside_error + 0.3 * share_error + paint_error
    return loss, {name: error.detach() for name, error in metrics.items()}


def in_cells(parts: list[Tensor], side: int) -> Tensor:
    """(n, c, side, side) of parts (f, c, g, g), averaged."""
    return F.adaptive_avg_pool2d(torch.cat(parts), side)


def cells_off(said: Tensor, true: Tensor, weights: Tensor) -> Tensor:
    """Mean (Huber) distance in cells of places (n, 2, g, g) from true ones (n, g, g, 2), by weights (n, g, g), 0 where
    nothing is known; 0 where nothing at all is."""
    cells = weights.shape[-1] / 2
    true = rearrange(true, "n h w c -> n c h w")
    error = F.smooth_l1_loss(said * cells, true * cells, reduction="none").sum(1)
    return (error * weights).sum() / weights.sum().clamp(min=1)


def true_places(batch: Batch, index: int, side: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What is true of a sample's target frames: shifts (f, g, g, 2), kinds (f, g, g) and whose share shows each cell,
    (f, g, g): paint where a mouth or an eye opens, and where body or backdrop come into view that the portrait's head
    has hidden. What the head itself has hidden is nobody's."""
    assert batch.people is not None
    person = sample_identity(int(batch.people[index]))
    portrait, *motions = (from_array(row) for row in batch.motions[index])
    _, before = sources(person, portrait, portrait, side)
    told = [sources(person, portrait, motion, side) for motion in motions]
    shifts, kinds = (np.stack(part) for part in zip(*told, strict=True))
    shown_by = np.where(kinds == HEAD, AT_HEAD, BESIDE)
    cells = repeat(np.arange(side), "g -> h g", h=side)
    from_x, from_y = (
        np.clip(np.round(place + shifts[..., axis] * side / 2).astype(int), 0, side - 1)
        for axis, place in enumerate((cells, cells.T))
    )
    from_head = before[from_y, from_x] == HEAD
    hidden = from_head & (kinds != HEAD)
    shown_by = np.where(hidden | (kinds == INSIDE), PAINTED, shown_by)
    unknown = (kinds == NECK) | ((kinds == BODY) & hidden) | ((kinds == HEAD) & ~from_head)
    return shifts, kinds, np.where(unknown, UNKNOWN, shown_by)
