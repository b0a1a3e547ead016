"""Phases `guider`, `still` and `stream`: the networks that draw. Called by `training.quick`.

`guider` teaches the pose guider to say where each drawn keypoint is; after that only its last layer learns on.
`still` trains reference and denoising UNet on independent frames, without the temporal modules (the paper's first
training). `stream` slides windows over clips exactly as inference does, from the motion-interpolated start on the
noised portrait, feeding back its own predictions (the paper's sliding training), and adds the temporal modules.
Latents, poses and image tokens are computed once: the autoencoder and the encoders are frozen by then.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange, repeat
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from stages.config import ModelConfig
from stages.images import clip_pixels, signed
from stages.keypoints import draw, transform
from stages.networks.image_encoder import ImageEncoder
from stages.networks.motion_encoder import MotionEncoder
from stages.networks.pose_guider import PoseGuider
from stages.networks.unet import DenoisingUNet, Memory, ReferenceUNet, attention_names, extend_memory, project_memory
from stages.networks.vae import Vae
from stages.schedule import add_noise, frame_fractions, frame_timesteps, signal_fractions, step
from training.loop import train
from training.perception import FIRST_EXPRESSION, expression_tokens
from training.samples import People

LEVEL_SHARES = (0.1, 0.2, 0.25, 0.45)
"""How often each noise level is drawn in phase `still`, from the cleanest: the noisiest decides pose and expression."""
START_SHARE = 0.15
"""How often frames are shown as the noised portrait at every level, as in the first calls of a session."""
KEYFRAME_SHARE = 0.2
"""How often the memory also holds a second frame, so that keyframes are nothing new in inference."""
EYES, LIPS = (5, 6), (3, 4, 11, 13)
"""Keypoints whose surroundings weigh more in the loss."""


@dataclass(frozen=True)
class Encoded:
    """People as the drawing networks see them; n people, k frames, the portrait first."""

    latents: Tensor
    """(n, k, c, h, w)."""
    image_tokens: Tensor
    """(n, k, cross_attention_dim)."""
    features: Tensor
    """(n, k, c, h, w) what the pose guider's last layer reads."""
    expressions: Tensor
    """(n, k, 8)."""
    weights: Tensor
    """(n, k, 1, h, w) loss weights with mean 1."""


@dataclass(frozen=True)
class Animator:
    """The networks that phases `still` and `stream` train."""

    config: ModelConfig
    reference: ReferenceUNet
    denoiser: DenoisingUNet
    guider: PoseGuider
    encoder: MotionEncoder
    """Only for its positional table: tokens are made from true or estimated expressions."""

    def parameters(self) -> list[nn.Parameter]:
        """What is trained; duplicates do not occur."""
        parts = (self.reference, self.denoiser, self.guider.conv_out_modify)
        return [parameter for part in parts for parameter in part.parameters() if parameter.requires_grad]

    def memory(self, latent: Tensor, token: Tensor) -> Memory:
        """The portrait's memory with gradients; rounded to fp16 as inference rounds it."""
        features = [_rounded(layer) for layer in self.reference(latent[None], token)]
        return project_memory(self.denoiser, attention_names(self.config.unet), features, token)

    def tokens(self, expressions: Tensor) -> Tensor:
        return expression_tokens(expressions, self.encoder, self.config.motion_encoder)


def _rounded(layer: Tensor) -> Tensor:
    return layer + (layer.detach().half().float() - layer.detach())


def new_animator(config: ModelConfig, guider: PoseGuider, encoder: MotionEncoder, seed: int) -> Animator:
    """Fresh UNets whose temporal modules start as the identity; the guider's trunk is frozen."""
    torch.manual_seed(seed)
    denoiser = DenoisingUNet(config.unet, config.motion_encoder.token_dim)
    for name, parameter in denoiser.named_parameters():
        if "temporal_modules" in name and "temporal_transformer.proj_out" in name:
            nn.init.zeros_(parameter)
    guider.requires_grad_(False).conv_out_modify.requires_grad_(True)
    return Animator(config, ReferenceUNet(config.unet), denoiser, guider, encoder)


def train_guider(
    config: ModelConfig, people: People, minutes: float, seed: int, num_steps: int | None = None
) -> tuple[PoseGuider, list[float]]:
    """A pose guider whose first channels say, per drawn keypoint, how near it is and in which direction."""
    torch.manual_seed(seed)
    guider = PoseGuider(config.pose_guider, config.unet.block_channels[0])
    rng = np.random.default_rng(seed)
    side = config.latent_shape[1]

    def loss_of(index: int, spent: float) -> Tensor:
        who, frame = rng.integers(len(people.seeds), size=8), rng.integers(people.motions.shape[1], size=8)
        points = posed(people.canonical[who], people.motions[who, frame])
        shifted = points + torch.from_numpy(rng.uniform(-0.2, 0.2, (8, 1, 3)).astype(np.float32))
        target = direction_maps(shifted[:, list(config.keypoints.drawn), :2], side)
        found = guider(draw(shifted, config.size_px, config.keypoints)).float()
        num_maps = min(found.shape[1], target.shape[1])
        return F.mse_loss(found[:, :num_maps], target[:, :num_maps]) * 10

    return guider, train("guider", list(guider.parameters()), loss_of, minutes, 3e-3, num_steps)


def posed(canonical: NDArray[np.float32], motions: NDArray[np.float32]) -> Tensor:
    """(n, K, 3) keypoints in the picture from canonical ones (n, K, 3) and motions (n, 14)."""
    pose = torch.from_numpy(motions)
    return transform(torch.from_numpy(canonical), pose[:, :3], F.pad(pose[:, 3:5], (0, 1)), pose[:, 5:6])


def direction_maps(points: Tensor, side: int) -> Tensor:
    """(n, p, 2) points in [-1, 1] to (n, 3 · p, side, side): nearness, and nearness times the offset in cells."""
    centres = (torch.arange(side) + 0.5) * 2 / side - 1
    offset_x = (points[:, :, :1] - centres) * side / 2
    offset_y = (points[:, :, 1:] - centres) * side / 2
    near = torch.exp(-0.5 * (offset_x[:, :, None] ** 2 + offset_y[..., None] ** 2) / 1.2**2)
    return torch.cat([near, near * offset_x[:, :, None] / 2, near * offset_y[..., None] / 2], dim=1)


def guider_features(guider: PoseGuider, canvases: Tensor) -> Tensor:
    """Everything but the guider's last layer."""
    x = F.silu(guider.conv_in(canvases))
    for conv in guider.blocks:
        x = F.silu(conv(x))
    return x


@torch.no_grad()
def encode_people(
    config: ModelConfig,
    vae: Vae,
    image_encoder: ImageEncoder,
    guider: PoseGuider,
    people: People,
    seed: int,
    mirror: bool = False,
) -> Encoded:
    """Everything that the frozen networks say of people; `mirror` gives their mirrored, recoloured twins."""
    rng, parts = np.random.default_rng(seed), []
    for index in tqdm(range(len(people.seeds)), desc="encode", unit="person"):
        parts.append(_encode_person(config, vae, image_encoder, guider, people, index, rng, mirror))
    return Encoded(*(torch.stack([getattr(part, name) for part in parts]).clone() for name in Encoded.__annotations__))


def _encode_person(
    config: ModelConfig,
    vae: Vae,
    image_encoder: ImageEncoder,
    guider: PoseGuider,
    people: People,
    index: int,
    rng: np.random.Generator,
    mirror: bool,
) -> Encoded:
    pixels, motions = people.pixels[index], people.motions[index].copy()
    canonical = np.repeat(people.canonical[index : index + 1], len(motions), 0)
    if mirror:
        pixels, motions = twin(pixels, motions, rng)
    points = posed(canonical, _estimated(motions, rng))
    clip = torch.cat([clip_pixels(frame, config.image_encoder.image_px) for frame in pixels])
    return Encoded(
        latents=vae.encode(signed(pixels)),
        image_tokens=image_encoder(clip),
        features=guider_features(guider, draw(points, config.size_px, config.keypoints)),
        expressions=torch.from_numpy(motions[:, FIRST_EXPRESSION:]),
        weights=loss_weights(posed(canonical, motions), config.latent_shape[1]),
    )


def twin(
    pixels: NDArray[np.uint8], motions: NDArray[np.float32], rng: np.random.Generator
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """The mirrored person in other colours, and the motion that fits it."""
    mirrored = motions.copy()
    mirrored[:, [1, 2, 3, 6]] *= -1
    mirrored[:, [8, 9]] = motions[:, [9, 8]]
    images = signed(np.ascontiguousarray(pixels[:, :, ::-1]))[None].flatten(0, 1)
    order = rng.permutation(3).tolist() if rng.random() < 0.5 else [0, 1, 2]
    gain = torch.from_numpy(rng.uniform(0.75, 1.1, (1, 3, 1, 1)).astype(np.float32))
    coloured = ((images[:, order] + 1) * gain).clamp(0, 2) * 127.5
    return rearrange(coloured.to(torch.uint8), "n c h w -> n h w c").numpy(), mirrored


def _estimated(motions: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    """Motions as an extractor would see them: a little wrong; the scale is the portrait's, so wrong for all alike."""
    noisy = motions.copy()
    noisy[:, :3] += rng.normal(0, 1.2, (len(motions), 3))
    noisy[:, 3:5] += rng.normal(0, 0.008, (len(motions), 2))
    noisy[:, 5] *= 1 + rng.normal(0, 0.02)
    return noisy


def loss_weights(points: Tensor, side: int) -> Tensor:
    """(n, 1, side, side) from keypoints (n, K, 3): the face counts more than the backdrop, eyes and mouth most."""
    mouth = points[:, list(LIPS)].mean(1, keepdim=True)
    eyes, face = points[:, list(EYES)], points.mean(1, keepdim=True)
    weight = 0.6 + 1.2 * _blob(face, side, 4.5) + 2.5 * _blob(eyes, side, 1.3) + 2.5 * _blob(mouth, side, 1.6)
    return weight / weight.mean((1, 2, 3), keepdim=True)


def _blob(points: Tensor, side: int, cells: float) -> Tensor:
    centres = (torch.arange(side) + 0.5) * 2 / side - 1
    x = (points[:, :, :1] - centres) * side / 2 / cells
    y = (points[:, :, 1:2] - centres) * side / 2 / cells
    return torch.exp(-0.5 * (x[:, :, None] ** 2 + y[..., None] ** 2)).sum(1, keepdim=True)


class Skip(nn.Module):
    """Stands in for a temporal module and does nothing."""

    def forward(self, x: Tensor, num_frames: int) -> Tensor:
        return x


@contextmanager
def without_temporal(denoiser: DenoisingUNet) -> Iterator[None]:
    """The denoiser as an image model: its temporal modules are taken out for a while."""
    blocks = [*denoiser.down_blocks, denoiser.mid_block, *denoiser.up_blocks]
    kept = [block.temporal_modules for block in blocks]
    for block in blocks:
        block.temporal_modules = nn.ModuleList([Skip() for _ in block.temporal_modules])
    try:
        yield
    finally:
        for block, modules in zip(blocks, kept, strict=True):
            block.temporal_modules = modules


def latent_loss(prediction: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean of squared and absolute errors: the square finds the place, the absolute keeps edges."""
    error = (prediction - target).abs()
    return ((error * error + 0.5 * error) * weights).mean()


def train_still(
    animator: Animator,
    people: Encoded,
    minutes: float,
    seed: int,
    batch: int = 2,
    num_steps: int | None = None,
    peak: float = 1.5e-3,
) -> list[float]:
    """Reference, denoiser and the guider's last layer on independent frames; returns all losses."""
    rng = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    with without_temporal(animator.denoiser):

        def loss_of(index: int, spent: float) -> Tensor:
            return still_loss(animator, people, rng.integers(len(people.latents), size=batch), rng, generator)

        return train("still", animator.parameters(), loss_of, minutes, peak, num_steps, bfloat16=False)


def still_loss(
    animator: Animator, people: Encoded, who: NDArray[np.int64], rng: np.random.Generator, generator: torch.Generator
) -> Tensor:
    """One call over all frames of some people; one of their frames is the portrait."""
    window = animator.config.window
    num_frames = people.latents.shape[1] - 1
    portrait = 0 if rng.random() < 0.5 else int(rng.integers(num_frames + 1))
    shown = [frame for frame in range(num_frames + 1) if frame != portrait]
    levels = rng.choice(len(window.timesteps), num_frames, p=LEVEL_SHARES)
    timesteps = torch.tensor([window.timesteps[level] for level in levels])
    target = people.latents[who][:, shown]
    start = people.latents[who, portrait][:, None].expand_as(target)
    estimate = start if rng.random() < START_SHARE else _imperfect(target, start, generator)
    noise = torch.randn(target.shape, generator=generator)
    noisy = descended(animator.config, estimate, start, noise, timesteps)
    memories = [_memories(animator, people, int(i), portrait, rng) for i in who]
    expressions = people.expressions[who][:, shown]
    expressions = expressions + 0.06 * torch.randn(expressions.shape, generator=generator)
    pose = animator.guider.conv_out_modify(people.features[who][:, shown].flatten(0, 1)).unflatten(0, (len(who), -1))
    prediction = animator.denoiser(noisy, timesteps, animator.tokens(expressions), pose, memories)
    return latent_loss(prediction, target, people.weights[who][:, shown])


def descended(config: ModelConfig, estimate: Tensor, start: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """What the deterministic steps leave at `timesteps` (f,) of frames that entered as `start`, noised, and of which
    every call so far predicted `estimate`; all (b, f, c, h, w). The portrait's trace fades with the noise."""
    fractions = signal_fractions(config.window)
    entered, now = fractions[config.window.timesteps[-1]], rearrange(fractions[timesteps], "f -> f 1 1 1")
    kept = noise + (entered / (1 - entered)).sqrt() * (start - estimate)
    return now.sqrt() * estimate + (1 - now).sqrt() * kept


def _memories(animator: Animator, people: Encoded, person: int, portrait: int, rng: np.random.Generator) -> Memory:
    """The portrait's memory, sometimes with another frame behind it, as a keyframe would be."""
    token = people.image_tokens[person, portrait]
    memory = animator.memory(people.latents[person, portrait], token)
    if rng.random() >= KEYFRAME_SHARE:
        return memory
    other = people.latents[person, int(rng.integers(people.latents.shape[1]))]
    blurred = other + 0.15 * torch.from_numpy(rng.standard_normal(other.shape, dtype=np.float32))
    return extend_memory(memory, animator.memory(blurred, token))


def _imperfect(target: Tensor, start: Tensor, generator: torch.Generator) -> Tensor:
    """Latents as an earlier call would have left them: between the truth and the portrait, and a little noisy."""
    share = torch.rand((*target.shape[:2], 1, 1, 1), generator=generator) ** 2 * 0.6
    return target + share * (start - target) + 0.3 * share * torch.randn(target.shape, generator=generator)


def train_stream(
    animator: Animator,
    clips: Encoded,
    minutes: float,
    seed: int,
    batch: int = 2,
    num_steps: int | None = None,
    peak: float = 6e-4,
) -> list[float]:
    """Everything, on windows sliding over clips (the portrait, the transition, driving frames); returns all losses."""
    rng = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    calls = _sliding(animator, clips, batch, rng, generator)
    return train(
        "stream", animator.parameters(), lambda index, spent: next(calls), minutes, peak, num_steps, bfloat16=False
    )


def _sliding(
    animator: Animator, clips: Encoded, batch: int, rng: np.random.Generator, generator: torch.Generator
) -> Iterator[Tensor]:
    """The loss of one call after the other; between two calls the caller updates the weights."""
    window = animator.config.window
    num_calls = (clips.latents.shape[1] - 1 - window.num_transition_frames) // window.chunk_frames
    now, then = frame_fractions(window)
    timesteps = frame_timesteps(window)
    while True:
        who = rng.integers(len(clips.latents), size=batch)
        portrait = clips.latents[who, 0]
        latents = noised(animator.config, portrait, window.timesteps[:-1], generator)
        for call in range(num_calls):
            entering = noised(animator.config, portrait, window.timesteps[-1:], generator)
            latents = torch.cat([latents, entering], 1)
            frames = slice(1 + call * window.chunk_frames, 1 + call * window.chunk_frames + window.num_frames)
            memories = [animator.memory(clips.latents[i, 0], clips.image_tokens[i, 0]) for i in who]
            pose = animator.guider.conv_out_modify(clips.features[who][:, frames].flatten(0, 1))
            tokens = animator.tokens(clips.expressions[who][:, frames])
            prediction = animator.denoiser(latents, timesteps, tokens, pose.unflatten(0, (batch, -1)), memories)
            yield latent_loss(prediction, clips.latents[who][:, frames], clips.weights[who][:, frames])
            pairs = zip(prediction.detach(), latents, strict=True)
            lowered = torch.stack([step(p, x, now, then, window.prediction)[0] for p, x in pairs])
            latents = lowered[:, window.chunk_frames :]


def noised(config: ModelConfig, portrait: Tensor, timesteps: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """(b, c, h, w) portraits as one chunk per timestep: (b, chunks · chunk_frames, c, h, w)."""
    fractions = signal_fractions(config.window)[list(timesteps)].repeat_interleave(config.window.chunk_frames)
    start = repeat(portrait, "b c h w -> b f c h w", f=len(fractions))
    noise = torch.randn(start.shape, generator=generator)
    return torch.stack([add_noise(clean, n, fractions) for clean, n in zip(start, noise, strict=True)])
