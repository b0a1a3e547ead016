"""Phase `mover`: the network that moves the portrait (`stages.networks.mover`), for models that start from nothing.

The drawn world knows where everything in its pictures is from (`training.places`), and what it knows is learned in a
tenth of the steps that pictures alone would take: from these a network first learns to lay half of one guess over half
of another. Depths and light are asked for of every picture, since each could be a portrait; expressions as the
portrait itself would have them, its head where it is: beside the errors of a head that turns, those of an iris would
not be seen. Pictures teach the rest.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional as F

from stages.apart import taken_apart
from stages.config import ModelConfig
from stages.errors import BadConfig
from stages.images import signed
from stages.keypoints import draw as draw_keypoints
from stages.moved import bounded, cells
from stages.networks.expressions import seen_at
from stages.networks.mover import FINER, FIRST_SHARES, Looked, Mover, Said, composed
from stages.networks.pose_guider import PoseGuider
from training.clips import Batch
from training.identity import sample_identity
from training.known import FIRST_EXPRESSION
from training.motion import from_array
from training.phases.animation import AnimationPhase, softness
from training.phases.phase import Draws, Update
from training.places import BACKDROP, BODY, HEAD, INSIDE, NECK, head_shape, light_map, sources
from training.recipes import MoverConfig
from training.regions import box_mask, region_weights

NETWORKS = ("keypoint_extractor", "motion_encoder", "pose_guider")
UNKNOWN = -100
"""Of cells of which nobody says which share shall show them; what `F.cross_entropy` ignores."""
AT_HEAD, BESIDE, PAINTED = range(3)
PARTS_WEIGHT = 20.0
"""Of cells of eyes and mouth beside the others, where expressions are asked for: there they are."""
SQUARED_WITHIN = 0.25
"""Cells within which an error of places counts by its square, and beyond by itself."""
EXPRESSIONS_SQUARED_WITHIN = 2.0
"""The same where expressions are asked for. Most of a face rests in most of them, and where absolute errors count,
nothing moves until a network is sure that more than half of a cell's cases do: it was not, after hundreds of steps."""

DEPTHS_SQUARED_WITHIN = 1.0
"""Cells within which an error of depths counts by its square."""
OUTLINE_WEIGHT = 3.0
"""Of the error of which cells are of the head, beside that of depths in cells."""
FACING_WEIGHT = 3.0
"""Of the error of where the surface faces, in lengths of its normal, beside that of depths in cells."""
THICKNESS_WEIGHT = 0.3
"""Of the error of how thick the head is, in cells of which it measures many, beside that of depths in cells."""
LIGHT_WEIGHT = 10.0
"""Of the squared error of light, in logarithms of brightness, beside that of depths in cells."""
DEEPER = 0.05
"""Half picture sides by which places of a head lie deeper than what the portrait shows there, if it hides them."""
LIT_WITHIN = 0.1
"""Errors of tint count by their square within this, in pictures of [0, 1]."""
TINT_WEIGHT = 10.0
"""Of the error of tint, which is a hundredth, beside that of places in cells."""


class MoverPhase(AnimationPhase):
    """Trains the mover inside `pose_guider` on the target frames of a batch."""

    config: MoverConfig

    def __init__(
        self, model: ModelConfig, config: MoverConfig, networks: dict[str, nn.Module], perceptual: nn.Module | None
    ):
        if not model.pose_guider.mover_channels:
            raise BadConfig(f"phase mover: {model.name} has none: leave it out or set model.pose_guider.mover_channels")
        if not any(getattr(config, f"{name}_weight") for name in ("depth", "expression", "place", "picture")):
            raise BadConfig("phase mover: all its weights are 0, so nothing is learned: set one above 0")
        super().__init__(model, config, networks)
        self.side = FINER * model.size_px // model.pose_guider.head.grid_px
        self.perceptual = None if perceptual is None else perceptual.requires_grad_(False)

    def forward(self, batch: Batch, draw: Draws, step: int, index: int, carry: Any) -> Update:
        flat = signed(rearrange(batch.pixels, "b f h w c -> (b f) h w c")).to(self.device)
        images = rearrange(flat, "(b f) c h w -> b f c h w", b=len(batch.pixels))
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            keypoints = self._keypoints(batch, flat, draw)
            tokens = self._tokens(batch, images, keypoints, draw)
        shapes, lights, looked = self._look(images / 2 + 0.5, keypoints, tokens)
        loss, metrics = torch.zeros((), device=self.device), dict[str, Tensor]()
        is_drawn = batch.people is not None and bool((batch.people >= 0).all())
        if is_drawn and self.config.depth_weight:
            error, metrics = shape_loss(shapes, keypoints, batch)
            unlike = light_loss(lights, batch)
            loss = loss + self.config.depth_weight * (error + LIGHT_WEIGHT * unlike)
            metrics["light"] = unlike.detach()
        if is_drawn and self.config.expression_weight:
            error, errors = self._expression_loss(batch, keypoints, tokens, looked)
            loss, metrics = loss + self.config.expression_weight * error, metrics | errors
        if not (is_drawn or self.config.picture_weight):
            raise BadConfig("phase mover: filmed clips teach by their pictures alone: set mover.picture_weight above 0")
        if not (self.config.place_weight or self.config.picture_weight):
            return Update(loss, metrics)
        said = [self._say(*sample) for sample in zip(images, keypoints, tokens, looked, strict=True)]
        if is_drawn and self.config.place_weight:
            error, errors = place_loss(said, batch, images / 2 + 0.5, self._weights(batch, self.side))
            loss, metrics = loss + self.config.place_weight * error, metrics | errors
        if self.config.picture_weight:
            error, errors = self._picture_loss(said, looked, batch, images)
            loss, metrics = loss + self.config.picture_weight * error, metrics | errors
        return Update(loss, metrics)

    def _look(self, images: Tensor, keypoints: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, list[Looked]]:
        """Shapes (b, 1 + f, 5, g, g) and light (b, 1 + f, 3, m, m) of all pictures (b, 1 + f, 3, s, s) in [0, 1], and
        what is found in portraits."""
        mover, points = self._mover(), bounded(keypoints)
        pictures = [rearrange(part, "b f ... -> (b f) ...") for part in (images, points)]
        flat = mover.depths(*pictures)
        told = flat, mover.light(*pictures, flat.detach())
        shapes, lights = (rearrange(part, "(b f) ... -> b f ...", b=len(images)) for part in told)
        portraits = zip(images[:, 0], points[:, 0], tokens[:, 0], strict=True)
        fields = [mover.expressions.fields(*parts) for parts in portraits]
        apart = [taken_apart(image, shape[0, 1].detach()) for image, shape in zip(images[:, 0], shapes, strict=True)]
        parts = zip(shapes[:, 0], fields, lights[:, 0], apart, strict=True)
        return shapes, lights, [Looked(*part) for part in parts]

    def _say(self, pictures: Tensor, keypoints: Tensor, tokens: Tensor, looked: Looked) -> Said:
        """One sample's answers: pictures (1 + f, 3, s, s) in [-1, 1], the first being the portrait."""
        drawn = draw_keypoints(keypoints[1:], self.model.size_px, self.model.keypoints)
        portrait = pictures[0] / 2 + 0.5
        return self._mover().say(drawn, portrait, keypoints[0], keypoints[1:], tokens[0], tokens[1:], looked)

    def _mover(self) -> Mover:
        mover = self.network("pose_guider", PoseGuider).mover
        assert mover is not None
        return mover

    def _expression_loss(
        self, batch: Batch, keypoints: Tensor, tokens: Tensor, looked: list[Looked]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        expressions, seen = self._mover().expressions, []
        for points, own, found in zip(bounded(keypoints[:, 0]), tokens, looked, strict=True):
            told = expressions.told(found.fields, own[0], own[1:])
            everywhere = cells(self.side, points).expand(len(told), -1, -1, -1)
            seen.append(seen_at(told, everywhere, points))
        boxes = repeat(torch.from_numpy(batch.boxes[:, 0]), "b k c -> (b f) k c", f=tokens.shape[1] - 1)
        parts = box_mask(boxes[:, 1:].to(self.device), self.model.size_px, self.side).amax(1)
        return expression_loss(torch.cat(seen), batch, 1 + PARTS_WEIGHT * parts)

    def _weights(self, batch: Batch, side: int) -> Tensor:
        """(b · f, 1, side, side) of the target frames' cells: face, and eyes and mouth more."""
        boxes = rearrange(torch.from_numpy(batch.boxes[:, 1:]).to(self.device), "b f k c -> (b f) k c")
        return region_weights(boxes, self.model.size_px, side, self.config.face_weight, self.config.parts_weight)

    def _picture_loss(
        self, said: list[Said], looked: list[Looked], batch: Batch, images: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Squared, absolute and perceptual error of the moved portraits, weighted in face, eyes and mouth."""
        blend = self._mover().blend
        moved = torch.cat([composed(seen.apart, one, blend) for seen, one in zip(looked, said, strict=True)]) * 2 - 1
        target = rearrange(images[:, 1:], "b f c h w -> (b f) c h w")
        weights = self._weights(batch, self.model.size_px)
        error = moved - target
        loss = ((error.square() + self.config.absolute_weight * error.abs()) * weights).mean()
        soft = softness(moved, target)
        loss = loss + self.config.sharpness_weight * soft
        metrics = {"psnr_db": 10 * torch.log10(4 / F.mse_loss(moved.detach(), target)), "softness": soft.detach()}
        if self.perceptual is not None:
            distance = self.perceptual(moved, target).mean()
            loss, metrics["perceptual"] = loss + self.config.perceptual_weight * distance, distance.detach()
        return loss, metrics


def shape_loss(said: Tensor, keypoints: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Errors of what `stages.networks.depths` says of all pictures, (b, 1 + f, 5, g, g), whose keypoints are
    (b, 1 + f, K, 3): of depths and thickness (in cells), of which cells are of the head, and of where they face."""
    assert batch.people is not None
    side = said.shape[-1]
    people = [sample_identity(int(number)) for number in batch.people]
    told = [
        head_shape(person, from_array(row), side)
        for person, motions in zip(people, batch.motions, strict=True)
        for row in motions
    ]
    depth, is_head, normals, thickness = (
        torch.from_numpy(np.stack(part)).to(said.device) for part in zip(*told, strict=True)
    )
    ours, logits, across, down, thick = rearrange(said, "b f c h w -> c (b f) h w")
    middle = rearrange(bounded(keypoints).mean(2)[..., 2], "b f -> (b f) 1 1")
    num_cells = is_head.sum().clamp(min=1)

    def cells_deep(off: Tensor) -> Tensor:
        error = F.smooth_l1_loss(off * side / 2, torch.zeros_like(off), beta=DEPTHS_SQUARED_WITHIN, reduction="none")
        return (error * is_head).sum() / num_cells

    error, thick_error = cells_deep(ours - (depth - middle)), cells_deep(thick - thickness)
    outline = F.binary_cross_entropy_with_logits(logits, is_head.float())
    turned = ((torch.stack([across, down], -1) - normals[..., :2]).square().sum(-1) * is_head).sum() / num_cells
    metrics = {"depths": error, "thickness": thick_error, "outline": outline, "facing": turned}
    loss = error + THICKNESS_WEIGHT * thick_error + OUTLINE_WEIGHT * outline + FACING_WEIGHT * turned
    return loss, {name: part.detach() for name, part in metrics.items()}


def light_loss(said: Tensor, batch: Batch) -> Tensor:
    """Mean squared error of what `stages.networks.light` says of all pictures, (b, 1 + f, 3, m, m)."""
    assert batch.people is not None
    told = [light_map(sample_identity(int(number)), said.shape[-1]) for number in batch.people]
    true, within = (torch.from_numpy(np.stack(part)).to(said.device) for part in zip(*told, strict=True))
    error = (said - rearrange(true, "b h w c -> b 1 c h w")).square().mean((1, 2))
    return (error * within).sum() / within.sum()


def expression_loss(seen: Tensor, batch: Batch, weights: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Errors of what `seen_at` says of the cells of all portraits, (b · f, 6, g, g), by weights (b · f, g, g): of
    places (as in `cells_off`), and of which cells are inside an open mouth or eye."""
    pulled, opened, _ = seen.split((2, 1, 3), dim=1)
    truth = [true_expressions(batch, index, weights.shape[-1]) for index in range(len(batch.pixels))]
    shifts, kinds = (torch.from_numpy(np.concatenate(part)).to(seen.device) for part in zip(*truth, strict=True))
    pulled = rearrange(pulled, "n c h w -> n h w c")
    error = cells_off(pulled, shifts, weights * (kinds == HEAD), EXPRESSIONS_SQUARED_WITHIN)
    logits = opened[:, 0] + FIRST_SHARES[PAINTED] - FIRST_SHARES[AT_HEAD]
    is_inside = (kinds == INSIDE).float()
    missed = F.binary_cross_entropy_with_logits(logits, is_inside, weights, reduction="sum") / weights.sum()
    return error + missed, {"expressions": error.detach(), "opened": missed.detach()}


def place_loss(said: list[Said], batch: Batch, images: Tensor, weights: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Errors of places (in cells), of what is the body, of shares, of paint and of tint, in the cells of `weights`
    (b · f, 1, g, g); images (b, 1 + f, 3, s, s) in [0, 1]."""
    side = weights.shape[-1]
    truth = [true_places(batch, index, side) for index in range(len(said))]
    stacked = (np.concatenate(part) for part in zip(*truth, strict=True))
    shift, kinds, shown_by, is_seen = (torch.from_numpy(part).to(images.device) for part in stacked)
    head, beside = (torch.cat([getattr(one, name) for one in said]) for name in ("head", "beside"))
    weights = rearrange(weights, "n 1 h w -> n h w")
    head_error = cells_off(head, shift, weights * is_seen)
    is_beside = (kinds == BODY) | (kinds == BACKDROP)
    beside_error = cells_off(beside, shift, weights * is_beside)
    is_body = torch.cat([one.is_body for one in said])[:, 0]
    confused = F.binary_cross_entropy_with_logits(is_body, (kinds == BODY).float(), reduction="none")
    body_error = (confused * is_beside).sum() / is_beside.sum().clamp(min=1)
    shares = torch.cat([one.shares for one in said])
    wrong = F.cross_entropy(shares, shown_by, ignore_index=UNKNOWN, reduction="none")
    share_error = (wrong * weights).sum() / (weights * (shown_by != UNKNOWN)).sum().clamp(min=1)
    paint = torch.cat([one.paint for one in said])
    colours = F.adaptive_avg_pool2d(rearrange(images[:, 1:], "b f c h w -> (b f) c h w"), paint.shape[-1])
    paint_error = F.l1_loss(paint, colours)
    tint, gain = (torch.cat([getattr(one, name) for one in said]) for name in ("tint", "gain"))
    tint_error = tint_loss(tint, gain, colours, images[:, 0], shift, weights * is_seen)
    metrics = {
        "head_cells": head_error, "beside_cells": beside_error, "body": body_error, "shares": share_error,
        "paint": paint_error, "tint": tint_error,
    }  # fmt: skip
    loss = head_error + beside_error + body_error + 0.3 * share_error + paint_error + TINT_WEIGHT * tint_error
    return loss, {name: error.detach() for name, error in metrics.items()}


def tint_loss(tint: Tensor, gain: Tensor, colours: Tensor, portraits: Tensor, shift: Tensor, weights: Tensor) -> Tensor:
    """Error of tint (b · f, 3, g, g), by weights (b · f, g, g): it shall be by how much the `colours` of cells
    (b · f, 3, g, g) differ from what portraits (b, 3, s, s), all in [0, 1], show at true places, away by `shift`
    (b · f, g, g, 2), `gain` times as bright."""
    side = tint.shape[-1]
    own = repeat(F.adaptive_avg_pool2d(portraits, side), "b c h w -> (b f) c h w", f=len(tint) // len(portraits))
    unlit = F.grid_sample(own, cells(side, tint) + shift, padding_mode="border", align_corners=False)
    error = F.smooth_l1_loss(tint + gain * unlit, colours, beta=LIT_WITHIN, reduction="none").mean(1)
    return (error * weights).sum() / weights.sum().clamp(min=1)


def cells_off(said: Tensor, true: Tensor, weights: Tensor, squared_within: float = SQUARED_WITHIN) -> Tensor:
    """Mean (Huber) distance in cells of places (n, g, g, 2) from true ones, by weights (n, g, g), 0 where nothing is
    known; 0 where nothing at all is. Up to `squared_within` cells d count as d² / (2 · squared_within)."""
    per_half = weights.shape[-1] / 2
    error = F.smooth_l1_loss(said * per_half, true * per_half, beta=squared_within, reduction="none").sum(-1)
    return (error * weights).sum() / weights.sum().clamp(min=1)


def true_expressions(batch: Batch, index: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """What is true of a sample's portrait with the expressions of its target frames: shifts (f, g, g, 2) and kinds
    (f, g, g)."""
    assert batch.people is not None
    person, own = sample_identity(int(batch.people[index])), batch.motions[index, 0]
    portrait = from_array(own)
    expressions = (
        from_array(np.concatenate([own[:FIRST_EXPRESSION], row[FIRST_EXPRESSION:]])) for row in batch.motions[index, 1:]
    )
    told = [sources(person, portrait, motion, side) for motion in expressions]
    shifts, kinds, _ = (np.stack(part) for part in zip(*told, strict=True))
    return shifts, kinds


def true_places(batch: Batch, index: int, side: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """What is true of a sample's target frames: shifts (f, g, g, 2), kinds (f, g, g), whose share shows each cell,
    (f, g, g), and where the portrait shows the same place of the head, (f, g, g) bool. Paint shows what is inside when
    a mouth or an eye opens. What the head has hidden of itself and of a backdrop is shown as `stages.apart` has filled
    it; what it has hidden of the body is nobody's."""
    assert batch.people is not None
    person = sample_identity(int(batch.people[index]))
    portrait, *motions = (from_array(row) for row in batch.motions[index])
    depth_before, was_head, _, _ = head_shape(person, portrait, side)
    told = [sources(person, portrait, motion, side) for motion in motions]
    shifts, kinds, depth = (np.stack(part) for part in zip(*told, strict=True))
    column = repeat(np.arange(side), "g -> h g", h=side)
    from_x, from_y = (
        np.clip(np.round(place + shifts[..., axis] * side / 2).astype(int), 0, side - 1)
        for axis, place in enumerate((column, column.T))
    )
    from_head = was_head[from_y, from_x]
    is_seen = (kinds == HEAD) & from_head & (depth < depth_before[from_y, from_x] + DEEPER)
    shown_by = np.select([kinds == HEAD, kinds == INSIDE], [AT_HEAD, PAINTED], BESIDE)
    unknown = (kinds == NECK) | ((kinds == BODY) & from_head)
    return shifts, kinds, np.where(unknown, UNKNOWN, shown_by), is_seen
