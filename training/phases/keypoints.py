"""Phase `keypoints`: the two networks that look at a driving frame, supervised by the world's exact answers.

The pose extractor learns head pose and keypoints from whole pictures, with pictures without a person among them; its
second look (`stages.networks.upright`), where it has one, learns angles from squares laid where the head is; the
motion encoder learns to read expressions off face crops into the tokens that `training.known` gives. The small image
encoder is not trained: the single token it yields is a fixed random projection of the portrait, and the denoiser learns
to use it as that.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from einops import rearrange, repeat
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from stages.config import ModelConfig, MotionEncoderConfig
from stages.errors import BadConfig
from stages.images import signed
from stages.keypoints import boxes, transform
from stages.messages import Floats
from stages.networks.keypoint_extractor import KeypointExtractor, RawPose, degrees_from_logits
from stages.networks.motion_encoder import MotionEncoder
from stages.networks.pinpoint import places_of
from stages.networks.upright import UNITS, upright
from training.clips import Batch, check_drawn
from training.disturb import degrade, displaced_face, empty_picture, reframe
from training.known import FIRST_EXPRESSION, posed, read_expression, token_map
from training.motion import EXPRESSION
from training.phases.phase import Draws, Phase, Update
from training.recipes import KeypointsConfig

NETWORKS = ("keypoint_extractor", "motion_encoder")
NOWHERE = (0.0, -3.0, 0.0)
"""Translation taught for pictures without a person: all keypoints far above the picture, so that the box is empty even
where the scale, taught to be 0, is a little off."""
MILD = 0.3
"""Strength of the shift and turn of pictures, and of the displacement of face crops, that are not disturbed
otherwise."""
SURPRISE_WEIGHT = 0.02
"""Of the cross-entropy of heat: as much as a place that is wrong by a pixel, once heat is as narrow as it can be."""
SECOND_LOOK_OFF = (0.024, 0.024, 0.015, 0.8)
"""Deviations of the second look's squares: across and down in head units, of the scale (1.5 %), degrees of roll."""
TURNS_SQUARED_WITHIN = 0.05
"""Of `UNITS`, within which an error of the second look counts by its square."""
EXPRESSION_WEIGHTS = (1.2, 1.5, 1.3, 1.3, 1.0, 2.0, 1.0, 1.0)


class KeypointsPhase(Phase):
    """Trains `keypoint_extractor` and `motion_encoder` on all frames of a batch of drawn clips."""

    def __init__(self, model: ModelConfig, config: KeypointsConfig, networks: dict[str, nn.Module]):
        super().__init__(model, networks)
        self.config = config
        self.helpers = nn.ModuleList(
            [nn.Linear(16 * model.motion_encoder.trunk_channels, len(EXPRESSION)) for _ in range(2)]
        )
        again = self._extractor().upright
        if not (config.pose_weight or config.motion_weight or (config.turn_weight and again is not None)):
            raise BadConfig(
                "phase keypoints: all its weights are 0 (turn_weight does not count for a model without "
                "keypoints.upright_channels), so nothing is learned: set one above 0"
            )
        if not config.pose_weight:
            self._extractor().requires_grad_(False)
        if again is not None:
            again.requires_grad_(config.turn_weight > 0)
        if not config.motion_weight:
            for idle in (self.networks["motion_encoder"], self.helpers):
                idle.requires_grad_(False)

    def forward(self, batch: Batch, draw: Draws, step: int, index: int, carry: Any) -> Update:
        check_drawn(batch, "phase keypoints", "give it drawn clips")
        pixels = rearrange(batch.pixels, "b f h w c -> (b f) h w c")
        motions = rearrange(batch.motions, "b f c -> (b f) c")
        canonical = repeat(batch.canonical, "b k c -> (b f) k c", f=batch.pixels.shape[1])
        loss, metrics = torch.zeros(()), dict[str, Tensor]()
        parts = [(self.config.pose_weight, self._pose_loss), (self.config.motion_weight, self._motion_loss)]
        if self._extractor().upright is not None:
            parts.append((self.config.turn_weight, self._turn_loss))
        for weight, part in parts:
            if weight:
                error, errors = part(pixels, motions, canonical, draw.numpy)
                loss, metrics = loss + weight * error, metrics | errors
        return Update(loss, metrics)

    def _pose_loss(
        self, pixels: NDArray[np.uint8], motions: Floats, canonical: Floats, rng: np.random.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        present = rng.random(len(pixels)) >= self.config.negative_share
        images, poses = disturbed(
            pixels, motions[:, :6], present, self.config.mild_share, self.model.keypoints.image_px, rng
        )
        device = next(self._extractor().parameters()).device
        raw = self._extractor().first_look(images.to(device))
        parts = (torch.from_numpy(part).to(device) for part in (canonical, poses, present))
        return keypoint_loss(raw, *parts)

    def _extractor(self) -> KeypointExtractor:
        extractor = self.networks["keypoint_extractor"]
        assert isinstance(extractor, KeypointExtractor)
        return extractor

    def _turn_loss(
        self, pixels: NDArray[np.uint8], motions: Floats, canonical: Floats, rng: np.random.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Of the second look, at squares where the head is, off by about as much as the first look is."""
        again, shape = self._extractor().upright, self.model.keypoints
        assert again is not None
        everybody = np.ones(len(pixels), bool)
        images, poses = disturbed(pixels, motions[:, :6], everybody, self.config.mild_share, shape.image_px, rng)
        device = next(again.parameters()).device
        squares, degrees = second_looks(images.to(device), poses, shape.upright_px, rng)
        wrong = again(squares) - degrees
        errors = dict(zip(("turn_pitch", "turn_yaw", "turn_roll"), wrong.detach().abs().mean(0), strict=True))
        units = torch.tensor(UNITS, device=device)
        return F.smooth_l1_loss(wrong / units, torch.zeros_like(wrong), beta=TURNS_SQUARED_WITHIN), errors

    def _motion_loss(
        self, pixels: NDArray[np.uint8], motions: Floats, canonical: Floats, rng: np.random.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        encoder, shape = self.networks["motion_encoder"], self.model.motion_encoder
        assert isinstance(encoder, MotionEncoder)
        face_boxes = boxes(
            posed(torch.from_numpy(canonical), torch.from_numpy(motions)), pixels.shape[1], self.model.keypoints
        )
        faces = zip(pixels, face_boxes.numpy(), strict=True)
        crops = np.stack([self._crop(face, box, rng) for face, box in faces])
        device = next(encoder.parameters()).device
        target = torch.from_numpy(motions[:, FIRST_EXPRESSION:]).to(device)
        read, helped = self._readings(encoder, shape, signed(crops).to(device))
        weight = torch.tensor(EXPRESSION_WEIGHTS, device=device)
        losses = [((guess - target).square() * weight).mean() for guess in (read, *helped)]
        errors = (read.detach() - target).abs().mean(0)
        metrics = {f"error_{name}": error for name, error in zip(EXPRESSION, errors, strict=True)}
        return torch.stack(losses).sum(), metrics

    def _crop(self, picture: NDArray[np.uint8], box: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.uint8]:
        """A face as the encoder shall be able to read it."""
        crop_px = self.model.motion_encoder.crop_px
        if rng.random() < self.config.mild_share:
            return displaced_face(picture, box, crop_px, rng, MILD)
        return degrade(displaced_face(picture, box, crop_px, rng), rng)

    def _readings(
        self, encoder: MotionEncoder, shape: MotionEncoderConfig, crops: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """Expressions read from the tokens, and by helper heads from two inner maps: they teach the trunk early."""
        watched: list[Tensor] = []
        hooks = [
            encoder.model.get_submodule(name).register_forward_hook(lambda _m, _i, output: watched.append(output))
            for name in ("att_2", "att_3")
        ]
        read = read_expression(encoder(crops).float(), encoder, shape)
        for hook in hooks:
            hook.remove()
        pooled = [F.adaptive_avg_pool2d(feature, 4).flatten(1) for feature in watched]
        return read, [head(feature).float() for head, feature in zip(self.helpers, pooled, strict=True)]


def disturbed(
    pixels: NDArray[np.uint8],
    poses: Floats,
    present: NDArray[np.bool_],
    mild_share: float,
    image_px: int,
    rng: np.random.Generator,
) -> tuple[Tensor, Floats]:
    """Pictures (n, 3, image_px, image_px) in [0, 1] as cameras see them, `mild_share` of them as they were drawn but
    for a little shift and turn, and their poses (n, 6); where nobody is `present`, pictures without a person."""
    pictures, changed = [], []
    for frame, pose, is_person in zip(pixels, poses, present, strict=True):
        moved_pose, is_mild = pose.copy(), rng.random() < (mild_share if is_person else 0.5)
        if is_person:
            picture, moved_pose = reframe(frame, moved_pose, image_px, rng, MILD if is_mild else 1.0)
        else:
            picture = empty_picture(image_px, rng)
        pictures.append(picture if is_mild else degrade(picture, rng))
        changed.append(moved_pose)
    return signed(np.stack(pictures)) / 2 + 0.5, np.stack(changed).astype(np.float32)


def second_looks(images: Tensor, poses: Floats, side: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Squares (n, 3, side, side) around the heads of pictures (n, 3, h, h) in [0, 1] with poses (n, 6), half of them
    mirrored, and what is to be read from them (n, 3)."""
    off = rng.normal(0, 1, (len(poses), 4)).astype(np.float32) * np.array(SECOND_LOOK_OFF, np.float32)
    scale, roll = poses[:, 5] * np.exp(off[:, 2]), poses[:, 2] + off[:, 3]
    place = poses[:, 3:5] + off[:, :2] * poses[:, 5:]
    middle, size, angle = (torch.from_numpy(part).to(images.device) for part in (place, scale, roll))
    squares = upright(images * 2 - 1, middle, size, angle, side)
    degrees = np.stack([poses[:, 0], poses[:, 1], -off[:, 3]], 1)
    # Mirrored people turn the other way.
    is_mirrored = rng.random(len(poses)) < 0.5
    squares[is_mirrored] = squares[is_mirrored].flip(-1)
    degrees[is_mirrored, 1:] *= -1
    return squares, torch.from_numpy(degrees).to(images.device)


def keypoint_loss(raw: RawPose, canonical: Tensor, pose: Tensor, present: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """canonical (n, K, 3), pose (n, 6) pitch, yaw, roll, x, y, scale; present (n,): is somebody there?"""
    # In fp32 also where networks train in mixed precision: bfloat16 is off by half a pixel.
    with torch.autocast(pose.device.type, enabled=False):
        return _keypoint_loss(raw, canonical, pose, present)


def _keypoint_loss(raw: RawPose, canonical: Tensor, pose: Tensor, present: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    found = raw.keypoints.float().unflatten(-1, (-1, 3))
    degrees = torch.stack([degrees_from_logits(part.float()) for part in (raw.pitch, raw.yaw, raw.roll)], -1)
    translation, scale = raw.translation.float(), raw.scale.float()
    placed = transform(found, degrees, translation, scale)
    target = transform(canonical, pose[:, :3], F.pad(pose[:, 3:5], (0, 1)), pose[:, 5:])
    turned = (degrees - pose[:, :3]).abs()
    error = (placed - target)[..., :2].abs().mean((1, 2)) * 8 + (found - canonical).abs().mean((1, 2))
    # Of what is wrong in a moved portrait, angles are the cause of nearly all.
    error = error + turned.mean(1) / 3 + (translation[:, :2] - pose[:, 3:5]).abs().mean(1) * 3
    collapsed = (translation - torch.tensor(NOWHERE, device=pose.device)).abs().mean(1) + 6 * scale[:, 0].abs()
    person = error + 6 * (scale[:, 0] - pose[:, 5]).abs()
    if raw.heat is not None:
        person = person + heat_loss(raw.heat, target[..., :2])
    seen = turned[present].detach().mean(0) if present.any() else turned.new_zeros(3)
    metrics = dict(zip(("error_pitch", "error_yaw", "error_roll"), seen, strict=True))
    return torch.where(present, person, collapsed).mean(), metrics


def heat_loss(heat: Tensor, target: Tensor) -> Tensor:
    """(n,): how wrong heat (n, K, s, s) is about places (n, K, 2), for keypoints inside the picture: the distance of
    its mean, and the cross-entropy with a spot of one cell's deviation, which teaches even where it is far off."""
    side = heat.shape[-1]
    inside = (target.abs() < 1).all(-1).float()
    places, _ = places_of(heat)
    lines = (torch.arange(side, device=heat.device) + 0.5) / side * 2 - 1
    spots = (-((target[..., None] - lines) * side / 2).square() / 2).softmax(-1)
    spot = torch.einsum("nkw,nkh->nkhw", spots[:, :, 0], spots[:, :, 1]).flatten(2)
    surprise = -(spot * heat.flatten(2).log_softmax(-1)).sum(-1)
    wrong = 8 * (places - target).abs().mean(-1) + SURPRISE_WEIGHT * surprise
    return (wrong * inside).mean(1)


@torch.no_grad()
def prime_bottleneck(encoder: MotionEncoder, config: MotionEncoderConfig) -> None:
    """Starts the layers behind the trunk's single channel as a plain read-out: equal stretches of its cells hold one
    expression each.

    From a random start they stay at the mean for a long time, since everything must pass one channel and a ReLU.
    """
    num_expressions, side, offset = len(EXPRESSION), config.crop_px // 8, 1.5
    written = token_map(config.num_tokens, config.token_dim)
    nn.init.constant_(encoder.model.conv6.get_parameter("bias"), offset)
    for layer in (encoder.model.fc, encoder.final_proj):
        layer.weight.mul_(0.05)
        layer.bias.zero_()
    stretch = torch.arange(side**2) * num_expressions // side**2
    for index in range(num_expressions):
        encoder.model.fc.weight[index] += (stretch == index).float() / (stretch == index).sum()
        encoder.model.fc.bias[index] = -offset
        encoder.final_proj.weight[:, index] += written[index]
