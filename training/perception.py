"""Phases `keypoints` and `motion`: the two networks that look at a driving frame. Called by `training.quick`.

Both learn from the world's exact poses and expressions. The motion tokens of this short training are not discovered but
given: each expression of `training.motion.EXPRESSION` is written linearly into two tokens. So the denoiser can learn
from exact tokens while the encoder is still learning to read them off pictures.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from stages.config import KeypointConfig, ModelConfig, MotionEncoderConfig
from stages.images import signed
from stages.keypoints import boxes, degrees_from_logits, transform
from stages.messages import Pixels
from stages.networks.keypoint_extractor import KeypointExtractor, RawPose
from stages.networks.motion_encoder import MotionEncoder
from training.identity import sample_identity
from training.loop import train
from training.motion import EXPRESSION
from training.world import backdrop

NEGATIVE_SHARE = 0.1
NOWHERE = (0.0, -3.0, 0.0)
"""Translation taught for pictures without a person: all keypoints far above the picture, so that the box is empty even
where the scale, taught to be 0, is a little off."""
TOKEN_SIZE = 0.7
FIRST_EXPRESSION = 6
"""Column of `gaze_x` in a motion's array; before it come pitch, yaw, roll, x, y, scale."""


@dataclass(frozen=True)
class Frames:
    """n pictures with what is true of them."""

    pixels: Pixels
    """(n, s, s, 3)."""
    motions: NDArray[np.float32]
    """(n, 14)."""
    canonical: NDArray[np.float32]
    """(n, K, 3)."""


@lru_cache(maxsize=4)
def token_map(num_tokens: int, token_dim: int) -> Tensor:
    """(8, num_tokens · token_dim): how each expression is written into the tokens; a fixed random pattern of signs."""
    rng = np.random.default_rng(11)
    written = np.zeros((len(EXPRESSION), num_tokens, token_dim), np.float32)
    for index in range(len(EXPRESSION)):
        for token in (2 * index, 2 * index + 1):
            written[index, token % num_tokens] += TOKEN_SIZE * rng.choice([-1.0, 1.0], token_dim)
    return torch.from_numpy(written.reshape(len(EXPRESSION), -1))


def expression_tokens(expressions: Tensor, encoder: MotionEncoder, config: MotionEncoderConfig) -> Tensor:
    """(..., 8) expressions to the (..., T, D) tokens that a perfect encoder gives."""
    flat = expressions @ token_map(config.num_tokens, config.token_dim)
    return flat.unflatten(-1, (config.num_tokens, config.token_dim)) + encoder.pe[0]


def read_expression(tokens: Tensor, encoder: MotionEncoder, config: MotionEncoderConfig) -> Tensor:
    """The inverse, by least squares: (..., T, D) to (..., 8)."""
    flat = (tokens - encoder.pe[0]).flatten(-2)
    return flat @ torch.linalg.pinv(token_map(config.num_tokens, config.token_dim))


def train_keypoints(
    extractor: KeypointExtractor,
    config: KeypointConfig,
    frames: Frames,
    minutes: float,
    seed: int,
    batch: int = 32,
    num_steps: int | None = None,
) -> list[float]:
    """Trains a keypoint extractor in place; pictures without a person are taught scale 0 and a place off the picture,
    so their face box is empty."""
    rng = np.random.default_rng(seed)

    def loss_of(index: int, spent: float) -> Tensor:
        images, canonical, pose, present = keypoint_batch(frames, config.image_px, batch, rng)
        return keypoint_loss(extractor(images), canonical, pose, present)

    return train("keypoints", list(extractor.parameters()), loss_of, minutes, 1.5e-3, num_steps)


def keypoint_loss(raw: RawPose, canonical: Tensor, pose: Tensor, present: Tensor) -> Tensor:
    """canonical (n, K, 3), pose (n, 6) pitch, yaw, roll, x, y, scale; present (n, 1) is 0 where there is no person."""
    found = raw.keypoints.float().unflatten(-1, (-1, 3))
    degrees = torch.stack([degrees_from_logits(part.float()) for part in (raw.pitch, raw.yaw, raw.roll)], -1)
    translation, scale = raw.translation.float(), raw.scale.float()
    placed = transform(found, degrees, translation, scale)
    target = transform(canonical, pose[:, :3], F.pad(pose[:, 3:5], (0, 1)), pose[:, 5:])
    error = (placed - target)[..., :2].abs().mean((1, 2)) * 8 + (found - canonical).abs().mean((1, 2))
    error = error + (degrees - pose[:, :3]).abs().mean(1) / 6
    error = error + (translation[:, :2] - pose[:, 3:5]).abs().mean(1) * 3
    collapsed = (translation - torch.tensor(NOWHERE)).abs().mean(1) + 6 * scale[:, 0].abs()
    person = error + 6 * (scale[:, 0] - pose[:, 5]).abs()
    return torch.where(present[:, 0] > 0, person, collapsed).mean()


def keypoint_batch(
    frames: Frames, image_px: int, batch: int, rng: np.random.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Augmented pictures in [0, 1] with canonical keypoints, pose (n, 6) and presence."""
    chosen = rng.integers(len(frames.pixels), size=batch)
    present = rng.random(batch) >= NEGATIVE_SHARE
    pictures, poses = [], []
    for index, is_person in zip(chosen, present, strict=True):
        pose = frames.motions[index, :6].copy()
        if is_person:
            picture, pose = reframe(frames.pixels[index], pose, image_px, rng)
        else:
            picture = empty_picture(image_px, rng)
        pictures.append(degrade(picture, rng) if is_person or rng.random() < 0.5 else picture)
        poses.append(pose)
    images = signed(np.stack(pictures)) / 2 + 0.5
    pose_tensor = torch.from_numpy(np.stack(poses).astype(np.float32))
    return images, torch.from_numpy(frames.canonical[chosen]), pose_tensor, torch.from_numpy(present[:, None]).float()


def reframe(
    picture: Pixels, pose: NDArray[np.float32], image_px: int, rng: np.random.Generator
) -> tuple[Pixels, NDArray[np.float32]]:
    """Zoomed, shifted and turned in the picture plane, with its pose (pitch, yaw, roll, x, y, scale) following."""
    zoom, angle = float(np.exp(rng.uniform(-0.45, 0.45))), float(rng.normal(0, 7))
    shift = rng.uniform(-0.25, 0.25, 2)
    turn = zoom * np.array(((np.cos(r := np.radians(angle)), -np.sin(r)), (np.sin(r), np.cos(r))))
    half, out = picture.shape[0] / 2, image_px / 2
    # Pixel centres: p = half · (u + 1) - 0.5 for a place u in [-1, 1].
    linear = turn * (out / half)
    offset = out * (shift + 1) - 0.5 - linear @ np.full(2, half - 0.5)
    border = int(rng.choice([cv2.BORDER_REPLICATE, cv2.BORDER_REFLECT, cv2.BORDER_CONSTANT]))
    filling = tuple(float(v) for v in rng.integers(0, 256, 3))
    source: NDArray[Any] = cv2.blur(picture, (2, 2)) if zoom < 0.8 else picture
    moved = cv2.warpAffine(
        source,
        np.column_stack((linear, offset)),
        (image_px, image_px),
        flags=cv2.INTER_LINEAR,
        borderMode=border,
        borderValue=filling,
    )
    placed = turn @ pose[3:5] + shift
    changed = np.array((pose[0], pose[1], pose[2] + angle, *placed, pose[5] * zoom), np.float32)
    return np.asarray(moved, np.uint8), changed


def degrade(picture: Pixels, rng: np.random.Generator) -> Pixels:
    """Other light, colours, sharpness and noise, as cameras have them."""
    x: NDArray[Any] = picture.astype(np.float32) / 255
    if rng.random() < 0.15:
        x = x[..., rng.permutation(3)]
    if rng.random() < 0.15:
        x = np.repeat(x.mean(-1, keepdims=True), 3, -1)
    if rng.random() < 0.7:
        x = x * rng.uniform(0.65, 1.25, 3).astype(np.float32)
        x = (x - 0.5) * rng.uniform(0.5, 1.3) + 0.5 + rng.uniform(-0.15, 0.15)
    if rng.random() < 0.4:
        x = cv2.GaussianBlur(np.ascontiguousarray(x), (0, 0), rng.uniform(0.3, 1.6))
    if rng.random() < 0.5:
        x = x + rng.normal(0, rng.uniform(0.005, 0.07), x.shape).astype(np.float32)
    return np.asarray(np.clip(x, 0, 1) * 255 + 0.5, np.uint8)


def empty_picture(size: int, rng: np.random.Generator) -> Pixels:
    """A picture without a person: plain, a backdrop, smooth or rough noise, shapes."""
    kind = int(rng.integers(5))
    canvas: NDArray[Any] = np.ones((size, size, 3), np.float32) * rng.uniform(0, 1, 3).astype(np.float32)
    if kind == 0:
        # Covered lenses and black starts of films matter more than other plain pictures.
        canvas[:] = rng.choice([0.0, 0.5, 1.0, float(rng.uniform(0, 1))], p=[0.5, 0.1, 0.2, 0.2])
        return np.asarray(canvas * 255, np.uint8)
    if kind == 1:
        canvas = backdrop(sample_identity(int(rng.integers(100_000))), size).copy()
    if kind in (2, 3):
        coarse = rng.uniform(0, 1, (int(rng.integers(2, 12)),) * 2 + (3,)).astype(np.float32)
        canvas = cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC if kind == 2 else cv2.INTER_NEAREST)
    if kind == 4:
        canvas = rng.uniform(0, 1, canvas.shape).astype(np.float32)
    for _ in range(int(rng.integers(0, 5))):
        centre, axes = rng.integers(0, size, 2).tolist(), rng.integers(2, size // 3, 2).tolist()
        colour = tuple(float(v) for v in rng.uniform(0, 1, 3))
        if rng.random() < 0.5:
            cv2.rectangle(canvas, centre, (np.array(centre) + axes).tolist(), colour, -1)
        else:
            cv2.line(canvas, centre, rng.integers(0, size, 2).tolist(), colour, int(rng.integers(1, 9)), cv2.LINE_AA)
    return np.asarray(np.clip(canvas, 0, 1) * 255, np.uint8)


def true_boxes(frames: Frames, config: ModelConfig) -> NDArray[np.int64]:
    """(n, 4) face boxes from the true poses."""
    pose = torch.from_numpy(frames.motions[:, :6])
    points = transform(torch.from_numpy(frames.canonical), pose[:, :3], F.pad(pose[:, 3:5], (0, 1)), pose[:, 5:])
    return boxes(points, frames.pixels.shape[1], config.keypoints).numpy()


def train_motion_encoder(
    encoder: MotionEncoder,
    config: ModelConfig,
    frames: Frames,
    minutes: float,
    seed: int,
    batch: int = 32,
    num_steps: int | None = None,
) -> list[float]:
    """Trains a motion encoder in place to read the world's expressions off face crops, wherever the box is exactly.

    A fresh one should be primed (`prime_bottleneck`) before.
    """
    torch.manual_seed(seed)
    shape, rng = config.motion_encoder, np.random.default_rng(seed)
    watched, heads = _helper_heads(encoder, shape)
    face_boxes = true_boxes(frames, config)
    weight = torch.tensor([1.0, 1.0, 1.3, 1.3, 1.0, 2.0, 1.0, 1.0])
    parameters = [*encoder.parameters(), *heads.parameters()]

    def loss_of(index: int, spent: float) -> Tensor:
        chosen = rng.integers(len(frames.pixels), size=batch)
        crops = np.stack([degrade(_face(frames.pixels[i], face_boxes[i], shape.crop_px, rng), rng) for i in chosen])
        target = torch.from_numpy(frames.motions[chosen, FIRST_EXPRESSION:])
        read = read_expression(encoder(signed(crops)).float(), encoder, shape)
        pooled = [F.adaptive_avg_pool2d(feature, 4).flatten(1) for feature in watched.values()]
        helped = [head(feature).float() for head, feature in zip(heads, pooled, strict=True)]
        return sum(((guess - target).square() * weight).mean() for guess in (read, *helped))

    losses = train("motion", parameters, loss_of, minutes, 1.5e-3, num_steps)
    for module in (encoder.model.att_2, encoder.model.att_3):
        module._forward_hooks.clear()
    return losses


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


def _helper_heads(encoder: MotionEncoder, config: MotionEncoderConfig) -> tuple[dict[str, Tensor], nn.ModuleList]:
    """Linear read-outs of two inner feature maps, used while training only: they teach the trunk early."""
    watched: dict[str, Tensor] = {}
    for name in ("att_2", "att_3"):
        module = encoder.model.get_submodule(name)
        module.register_forward_hook(lambda _module, _inputs, output, name=name: watched.__setitem__(name, output))
    return watched, nn.ModuleList([nn.Linear(16 * config.trunk_channels, len(EXPRESSION)) for _ in range(2)])


def _face(picture: Pixels, box: NDArray[np.int64], crop_px: int, rng: np.random.Generator) -> Pixels:
    """The face box, a little displaced and resized, as an estimated one would be."""
    side = max(int(box[2] - box[0]), 8)
    x1, y1, x2, y2 = np.round(box + np.tile(rng.normal(0, 0.035, 2) * side, 2) + rng.normal(0, 0.04, 4) * side).astype(
        int
    )
    low, high = np.maximum((x1, y1), 0), np.minimum((x2, y2), picture.shape[0])
    part = picture[low[1] : high[1], low[0] : high[0]]
    return np.asarray(cv2.resize(part, (crop_px, crop_px), interpolation=cv2.INTER_LINEAR), np.uint8)
