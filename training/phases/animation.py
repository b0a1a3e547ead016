"""What the phases `motion`, `distill` and `stream` share: a batch as the drawing networks see it, and their losses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional as F

from stages.canvas import MOVED, ShownPortrait, canvases
from stages.config import ModelConfig
from stages.errors import BadConfig
from stages.images import clip_pixels, detector_frames, face_crop, signed
from stages.keypoints import box_is_usable, boxes, transform
from stages.networks.image_encoder import ImageEncoder
from stages.networks.keypoint_extractor import KeypointExtractor, degrees_of
from stages.networks.motion_encoder import MotionEncoder
from stages.networks.pose_guider import PoseGuider
from stages.networks.unet import (
    DenoisingUNet,
    LayerMemory,
    Memory,
    ReferenceUNet,
    TemporalModule,
    attention_names,
    project_memory,
)
from stages.networks.vae import Vae
from training.augment import augment_frames
from training.clips import Batch, check_drawn
from training.known import FIRST_EXPRESSION, expression_tokens, posed
from training.phases.phase import Draws, Phase
from training.recipes import AnimationConfig
from training.regions import region_weights

NETWORKS = (
    "vae", "image_encoder", "keypoint_extractor", "motion_encoder", "pose_guider", "reference_unet", "denoising_unet"
)  # fmt: skip
PLACE_NOISE = 0.006
"""Half picture widths per degree of noise."""
SCALE_NOISE = 0.01
"""Share per degree of `portrait_noise`."""
EXPRESSION_NOISE = 0.04
NUM_ENCODED_AT_ONCE = 10
"""Pictures (T): more need too much memory at full size."""

M = TypeVar("M", bound=nn.Module)

FLAT = 1e-6
"""Mean squared differences between neighbouring pixels below which a picture is not asked to have any."""


@dataclass(frozen=True)
class Scene:
    """b samples of f target frames and their reference, as the drawing networks see them."""

    images: Tensor
    """(b, f, 3, s, s) the target frames in [-1, 1]."""
    latents: Tensor
    """(b, f, c, h, w) of the target frames."""
    portraits: Tensor
    """(b, c, h, w) latents of the references."""
    motion: Tensor
    """(b, f, T, D) motion tokens."""
    pose: Tensor
    """(b, f, c0, h, w) pose features."""
    memories: tuple[Memory, ...]
    """One per sample."""
    weights: Tensor
    """(b, f, 1, h, w) of the loss; 1 outside the face."""
    boxes: Tensor
    """(b, f, 4, 4) face, eyes and mouth in pixels."""
    moved: Tensor
    """(b, f, 3, s, s) the moved portrait in [0, 1]; without channels where canvases do not show it."""


class AnimationPhase(Phase):
    """Networks by name, and a batch made into a Scene; subclasses add what is learned from it."""

    augment = staticmethod(augment_frames)
    """How the face crops of one sample are disturbed."""

    def __init__(self, model: ModelConfig, config: AnimationConfig, networks: dict[str, nn.Module]):
        super().__init__(model, networks)
        self.config = config
        choose_trained(self.networks, config)

    def network(self, name: str, kind: type[M]) -> M:
        """A network by name, as what it is."""
        found = self.networks[name]
        assert isinstance(found, kind)
        return found

    @property
    def denoiser(self) -> DenoisingUNet:
        return self.network("denoising_unet", DenoisingUNet)

    @property
    def device(self) -> torch.device:
        return next(self.networks["pose_guider"].parameters()).device

    def train(self, mode: bool = True) -> AnimationPhase:
        """Batch norms of what looks at frames keep their statistics: those of one person's frames are others."""
        super().train(mode)
        for name in ("motion_encoder", "keypoint_extractor"):
            self.networks[name].eval()
        return self

    def scene(self, batch: Batch, draw: Draws, whole: bool = False) -> Scene:
        """Everything the denoiser is told about a batch; some of it dropped at random, unless `whole`."""
        config, device = self.config, self.device
        pixels = rearrange(batch.pixels, "b f h w c -> (b f) h w c")
        num_samples = len(batch.pixels)
        images = signed(pixels).to(device)
        all_images = rearrange(images, "(b f) c h w -> b f c h w", b=num_samples)
        dropped = Dropped.none(num_samples) if whole else Dropped.draw(num_samples, config, draw)
        with torch.no_grad():
            encode = self.network("vae", Vae).encode
            latents = torch.cat([encode(part).float() for part in images.split(NUM_ENCODED_AT_ONCE)])
        # Places in fp32: bfloat16 is off by a pixel.
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            keypoints = self._keypoints(batch, images, draw)
        all_latents = rearrange(latents, "(b f) c h w -> b f c h w", b=num_samples)
        part_boxes = torch.from_numpy(batch.boxes[:, 1:]).to(device)
        flat_boxes = rearrange(part_boxes, "b f k c -> (b f) k c")
        side, (face, parts) = latents.shape[-1], (config.face_weight, config.parts_weight)
        weights = region_weights(flat_boxes, self.model.size_px, side, face, parts)
        tokens = self._tokens(batch, all_images, keypoints, draw)
        with torch.no_grad():
            shown = self._canvases(all_images, keypoints, tokens, dropped)
        return Scene(
            images=all_images[:, 1:],
            latents=all_latents[:, 1:],
            portraits=all_latents[:, 0],
            motion=tokens[:, 1:] * repeat((~dropped.motion).float().to(device), "b -> b 1 1 1"),
            pose=self._pose(shown, dropped),
            memories=self._memories(batch, all_latents[:, 0], draw, dropped, whole),
            weights=rearrange(weights, "(b f) 1 h w -> b f 1 h w", b=num_samples),
            boxes=part_boxes,
            moved=shown[:, :, MOVED],
        )

    def _keypoints(self, batch: Batch, images: Tensor, draw: Draws) -> Tensor:
        """(b, 1 + f, K, 3) keypoints of the pictures, all with the reference's canonical ones."""
        num_samples, num_pictures = batch.pixels.shape[:2]
        if self.config.poses == "truth":
            check_drawn(batch, "poses=truth", "set poses=extractor")
            motions = noisy_motions(batch.motions, self.config, draw.numpy)
            canonical = repeat(batch.canonical, "b k c -> (b f) k c", f=num_pictures)
            flat = rearrange(motions, "b f c -> (b f) c")
            points = posed(torch.from_numpy(canonical), torch.from_numpy(flat)).to(self.device)
        else:
            points = self._found_keypoints(images, num_pictures)
        return rearrange(points, "(b f) k c -> b f k c", b=num_samples)

    def _found_keypoints(self, images: Tensor, num_pictures: int) -> Tensor:
        extractor = self.network("keypoint_extractor", KeypointExtractor)
        with torch.autocast(self.device.type, enabled=False):
            raw = extractor(detector_frames(images, self.model.keypoints.image_px))
        canonical = rearrange(raw.keypoints, "n (k c) -> n k c", c=3)[::num_pictures]
        canonical = repeat(canonical, "b k c -> (b f) k c", f=num_pictures)
        return transform(canonical, degrees_of(raw), raw.translation, raw.scale)

    def _tokens(self, batch: Batch, images: Tensor, keypoints: Tensor, draw: Draws) -> Tensor:
        """(b, 1 + f, T, D) motion tokens of the pictures; zeros for the portrait where the encoder would have to read
        them and no mover asks for them."""
        encoder = self.network("motion_encoder", MotionEncoder)
        if self.config.expressions == "truth":
            check_drawn(batch, "expressions=truth", "set expressions=encoder")
            expressions = torch.from_numpy(batch.motions[..., FIRST_EXPRESSION:]).to(self.device)
            expressions = expressions + EXPRESSION_NOISE * draw.normal(expressions)
            return expression_tokens(expressions, encoder, self.model.motion_encoder)
        first = 0 if self.model.pose_guider.mover_channels else 1
        crops = self._crops(images[:, first:], keypoints[:, first:], draw)
        tokens = rearrange(encoder(crops).float(), "(b f) t d -> b f t d", b=len(images))
        return F.pad(tokens, (0, 0, 0, 0, first, 0))

    def _crops(self, images: Tensor, keypoints: Tensor, draw: Draws) -> Tensor:
        """(b · f, 3, crop_px, crop_px) augmented face crops of pictures (b, f, 3, s, s); the middle if no face is."""
        crop_px, size_px = self.model.motion_encoder.crop_px, self.model.size_px
        flat = rearrange(keypoints, "b f k c -> (b f) k c")
        found = boxes(flat.float().cpu(), size_px, self.model.keypoints)
        middle = torch.tensor((size_px // 4, size_px // 4, size_px - size_px // 4, size_px - size_px // 4))
        frames = rearrange(images, "b f c h w -> (b f) c h w")
        crops = torch.cat(
            [
                face_crop(frame, box if box_is_usable(box) else middle, crop_px)
                for frame, box in zip(frames, found, strict=True)
            ]
        )
        if self.config.augment == 0:
            return crops
        pixels = rearrange((crops + 1) * 127.5, "n c h w -> n h w c").round().to(torch.uint8).cpu().numpy()
        samples = np.split(np.ascontiguousarray(pixels), len(images))
        augmented = [self.augment(sample, draw.numpy, self.config.augment) for sample in samples]
        return signed(np.concatenate(augmented)).to(crops)

    def _canvases(self, images: Tensor, keypoints: Tensor, tokens: Tensor, dropped: Dropped) -> Tensor:
        """(b, f, 3 or 9, s, s); a dropped portrait is black."""
        mover = self.network("pose_guider", PoseGuider).mover
        parts = []
        for pictures, points, told, gone in zip(images, keypoints, tokens, dropped.reference, strict=True):
            shown = ShownPortrait((pictures[0] / 2 + 0.5) * (0.0 if gone else 1.0), points[0], told[0])
            parts.append(canvases(points[1:], told[1:], shown, mover, self.model))
        return torch.stack(parts).to(self.device)

    def _pose(self, shown: Tensor, dropped: Dropped) -> Tensor:
        """Canvases to pose features (b, f, c0, h, w)."""
        features = self.network("pose_guider", PoseGuider)(rearrange(shown, "b f c h w -> (b f) c h w"))
        features = rearrange(features, "(b f) c h w -> b f c h w", b=len(shown))
        return features * repeat((~dropped.pose).to(features), "b -> b 1 1 1 1")

    def _memories(
        self, batch: Batch, portraits: Tensor, draw: Draws, dropped: Dropped, whole: bool
    ) -> tuple[Memory, ...]:
        px = self.model.image_encoder.image_px
        clip = torch.cat([clip_pixels(picture, px) for picture in batch.pixels[:, 0]]).to(self.device)
        with torch.no_grad():
            tokens = self.network("image_encoder", ImageEncoder)(clip).float()
        share = 0.0 if whole else self.config.drop_reference_tokens
        return tuple(
            self._memory(portrait, token, draw, share, bool(gone))
            for portrait, token, gone in zip(portraits, tokens, dropped.reference, strict=True)
        )

    def _memory(self, latent: Tensor, token: Tensor, draw: Draws, hidden_share: float, gone: bool) -> Memory:
        """One portrait's keys and values; rounded to fp16 as inference rounds its features."""
        features = [as_half(layer) for layer in self.network("reference_unet", ReferenceUNet)(latent[None], token)]
        if hidden_share > 0:
            features = [hidden(layer, hidden_share, draw) for layer in features]
        memory = project_memory(self.denoiser, attention_names(self.model.unet), features, token)
        return without_tokens(memory) if gone else memory


@dataclass(frozen=True)
class Dropped:
    """Which samples (b,) miss their portrait, their pose, their motion."""

    reference: Tensor
    pose: Tensor
    motion: Tensor

    @classmethod
    def draw(cls, num_samples: int, config: AnimationConfig, draw: Draws) -> Dropped:
        shares = (config.drop_reference, config.drop_pose, config.drop_motion)
        return cls(*(draw.uniform(num_samples) < share for share in shares))

    @classmethod
    def none(cls, num_samples: int) -> Dropped:
        return cls(*(torch.zeros(num_samples, dtype=torch.bool) for _ in range(3)))


def choose_trained(networks: nn.ModuleDict, config: AnimationConfig) -> None:
    """Only parameters of trained networks require gradients: those whose name holds a trained part, where the config
    has any, and no frozen one. Raises BadConfig for an unknown network."""
    if unknown := sorted(set(config.trained) - set(NETWORKS)):
        raise BadConfig(f"`trained` names {', '.join(unknown)}; there are {', '.join(NETWORKS)}")
    for name, parameter in networks.named_parameters():
        chosen = not config.trained_parts or any(part in name for part in config.trained_parts)
        frozen = any(part in name for part in config.frozen_parts)
        parameter.requires_grad_(name.split(".")[0] in config.trained and chosen and not frozen)


def noisy_motions(motions: np.ndarray, config: AnimationConfig, rng: np.random.Generator) -> np.ndarray:
    """Motions (b, 1 + f, 14) as an extractor would see them: every pose a little wrong, the portrait's more so; and its
    place and scale, from which those of all frames follow, alike for a whole sample."""
    noisy = motions.copy()
    num_samples, num_pictures = motions.shape[:2]
    noisy[..., :3] += rng.normal(0, config.pose_noise, (num_samples, num_pictures, 3))
    noisy[..., 3:5] += rng.normal(0, config.pose_noise * PLACE_NOISE, (num_samples, num_pictures, 2))
    noisy[:, 0, :3] += rng.normal(0, config.portrait_noise, (num_samples, 3))
    noisy[..., 3:5] += rng.normal(0, config.portrait_noise * PLACE_NOISE, (num_samples, 1, 2))
    noisy[..., 5] *= 1 + rng.normal(0, config.portrait_noise * SCALE_NOISE, (num_samples, 1))
    return noisy


def as_half(layer: Tensor) -> Tensor:
    """Rounded to fp16, with the gradient of the identity."""
    return layer + (layer.detach().half().to(layer) - layer.detach())


def hidden(layer: Tensor, share: float, draw: Draws) -> Tensor:
    """Features (L, C) without a random share of their tokens."""
    kept = max(round(layer.shape[0] * (1 - share)), 1)
    order = torch.randperm(layer.shape[0], generator=draw.torch)[:kept].sort().values
    return layer[order.to(layer.device)]


def without_tokens(memory: Memory) -> Memory:
    """No portrait at all: nothing to attend to, and no image token."""
    return tuple(LayerMemory(m.keys[:, :0], m.values[:, :0], torch.zeros_like(m.constant)) for m in memory)


@contextmanager
def without_temporal(denoiser: DenoisingUNet) -> Iterator[None]:
    """The denoiser as an image model: its temporal modules rest for a while."""
    working = [module for module in denoiser.modules() if isinstance(module, TemporalModule) and not module.rests]
    for module in working:
        module.rests = True
    try:
        yield
    finally:
        for module in working:
            module.rests = False


def image_loss(decoded: Tensor, target: Tensor, face_boxes: Tensor, face_weight: float, parts_weight: float) -> Tensor:
    """Squared error of pictures (n, 3, s, s) in [-1, 1], more inside face and parts; boxes (n, 4, 4)."""
    weights = region_weights(face_boxes, target.shape[-1], target.shape[-1], face_weight, parts_weight)
    return (F.mse_loss(decoded, target, reduction="none") * weights).mean()


def softness(pictures: Tensor, target: Tensor) -> Tensor:
    """() by what share the squared differences between neighbouring pixels of pictures (n, 3, s, s) are smaller than
    those of `target`; 0 where they are larger."""
    energy, wanted = (
        part.diff(dim=-1).square().mean() + part.diff(dim=-2).square().mean() for part in (pictures, target)
    )
    return (1 - energy / wanted.clamp(min=FLAT)).clamp(min=0)


def resampled(scene: Scene, frames: slice) -> Scene:
    """The scene of some of its frames."""
    names = ("images", "latents", "motion", "pose", "weights", "boxes", "moved")
    return replace(scene, **{name: getattr(scene, name)[:, frames] for name in names})
