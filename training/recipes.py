"""What a training run is: recipes are functions that return a whole config. Read by `training.run` and the phases.

`official`: the paper's settings at full size, from given weights. `tiny`: the bundled model, from nothing. `smoke`:
every phase of a very small model in some minutes. Where paper and released code differ, the comment at the field
says which is taken (P paper, T released training code) and every alternative is a field.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from stages.config import (
    ImageEncoderConfig,
    KeypointConfig,
    ModelConfig,
    MotionEncoderConfig,
    PoseGuiderConfig,
    UNetConfig,
    VaeConfig,
    WindowConfig,
    from_dict,
)
from stages.errors import BadConfig
from training.clips import Sampling
from training.limits import check_phase

PHASES = ("autoencoder", "keypoints", "mover", "motion", "distill", "stream")


@dataclass(frozen=True)
class OptimiserConfig:
    """AdamW for the phase's networks, and another one for the discriminator where there is one."""

    learning_rate: float = 1e-5
    critic_learning_rate: float = 2e-5
    """T: twice the generator's; the paper gives one rate for all."""
    betas: tuple[float, ...] = (0.9, 0.999)
    epsilon: float = 1e-8
    weight_decay: float = 0.01
    num_warmup_steps: int = 0
    schedule: Literal["constant", "cosine"] = "constant"
    """cosine falls to a fiftieth at the last step."""
    max_gradient_norm: float = 1.0
    ema_decay: float = 0.0
    """Of the averaged weights that the phase hands on; 0: none, the last weights are handed on."""


@dataclass(frozen=True)
class PhaseConfig:
    """What every phase has."""

    num_steps: int = 30_000
    batch_size: int = 4
    """Samples per worker and step."""
    sampling: Sampling = field(default_factory=lambda: Sampling(num_frames=1, kind="spread"))
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    bfloat16: bool = True
    """Autocast of the forward pass; weights and optimiser stay fp32."""
    checkpoint_every: int = 500
    """Steps between checkpoints."""
    log_every: int = 20


@dataclass(frozen=True)
class AutoencoderConfig(PhaseConfig):
    """Pictures to latents and back (tiny only: the official model brings its own)."""

    latent_noise: float = 0.1
    """Deviation of the noise that the decoder learns to withstand, latents having deviation 1."""
    gradient_weight: float = 1.0
    parts_weight: float = 3.0
    """How much more eyes and mouth weigh than the rest."""


@dataclass(frozen=True)
class KeypointsConfig(PhaseConfig):
    """Pose extractor, its second look and motion encoder, supervised by the world's exact pose and expression; each
    alone, too (tiny only)."""

    negative_share: float = 0.1
    """Share of pictures without a person, for which the keypoints must collapse."""
    mild_share: float = 0.5
    """Share of pictures with a person, and of face crops, that are seen almost as they are: places are learned most
    exactly."""
    pose_weight: float = 1.0
    """Of the extractor's first look, for all that it says; 0: it is not trained."""
    turn_weight: float = 1.0
    """Of its second look, for angles, where it has one; likewise. Alone it is several times as fast."""
    motion_weight: float = 1.0
    """Of the motion encoder; likewise."""


@dataclass(frozen=True)
class AnimationConfig(PhaseConfig):
    """What phases `motion`, `distill` and `stream` share."""

    trained: tuple[str, ...] = ("reference_unet", "denoising_unet", "pose_guider", "motion_encoder")
    frozen_parts: tuple[str, ...] = (
        "reference_unet.up_blocks.3",
        "temporal_modules",
        "pose_guider.base.",
        "pose_guider.mover.",
    )
    """Name parts of what stays as it is inside trained networks. T; the paper updates everything. The last is the
    small model's: its first answer would fade, since halving what is uncertain is a quick way to a smaller error."""
    trained_parts: tuple[str, ...] = ()
    """Name parts of which everything that is trained has one; empty: no such condition."""
    drop_reference: float = 0.1
    """Share of samples that see no portrait at all. T, as the next three; the paper is silent."""
    drop_pose: float = 0.1
    drop_motion: float = 0.1
    drop_reference_tokens: float = 0.3
    """Share of the portrait's tokens that is hidden in each layer."""
    face_weight: float = 1.0
    """Added weight inside the face box. T, as the next; the paper weighs evenly."""
    parts_weight: float = 3.0
    """Added to both inside eyes and mouth: T squares masks of 1 in the face and 2 in its parts."""
    augment: float = 1.0
    """Strength of the driving crop's augmentation, 1 as in T."""
    pose_noise: float = 0.0
    """Deviation in degrees (and, times 0.006, in half picture widths) by which drawn poses are off, so that a model
    trained on exact poses meets what the extractor will say. Nobody sees these errors: they blur what is learned."""
    portrait_noise: float = 0.0
    """The same of the portrait's pose, beside which the portrait can be seen; of its place and scale (1 % a degree) all
    frames have a share, as the method moves portraits from where they are."""
    poses: Literal["extractor", "truth"] = "extractor"
    """Where head poses come from; truth only exists for drawn clips."""
    expressions: Literal["encoder", "truth"] = "encoder"
    """Where motion tokens come from; truth only exists for drawn clips."""


@dataclass(frozen=True)
class MoverConfig(AnimationConfig):
    """The network that moves the portrait, for models that have one (tiny only)."""

    trained: tuple[str, ...] = ("pose_guider",)
    trained_parts: tuple[str, ...] = ("pose_guider.mover.",)
    frozen_parts: tuple[str, ...] = ()
    expression_weight: float = 3.0
    """Of the error of what expressions do to the portrait; drawn clips have it, and the next."""
    depth_weight: float = 1.0
    """Of the error of a portrait's depths, of where its surface faces, and of its light, likewise."""
    place_weight: float = 1.0
    """Of the error of places; 0 with a picture weight of 0: only what is seen in portraits is learned (expressions,
    depths and light), several times as fast."""
    picture_weight: float = 1.0
    """Of the pictures' error; 0: only what the world knows is learned."""
    absolute_weight: float = 0.5
    """Of the pictures' absolute error beside the squared one, pictures in -1 to 1."""
    perceptual_weight: float = 0.0
    sharpness_weight: float = 0.0
    """Of the share by which differences between neighbouring pixels, squared, are too small: the smallest error is that
    of an outline which fades where it may run."""


@dataclass(frozen=True)
class MotionConfig(AnimationConfig):
    """Image level: one frame at a time from a portrait (paper, section 3.1)."""

    target: Literal["sample", "epsilon"] = "sample"
    """sample: squared error of the clean latent (T); epsilon: of the noise (P, eq. 10)."""
    absolute_weight: float = 0.0
    """Of the absolute error beside the squared one."""
    noise_offset: float = 0.05
    timesteps: Literal["all", "levels"] = "all"
    """all: 0 to 999 (P, T); levels: only those the window uses, for a model that will never see others."""
    level_shares: tuple[float, ...] = ()
    """How often each level is drawn, cleanest first; empty: evenly."""


@dataclass(frozen=True)
class DistillConfig(AnimationConfig):
    """Few-step appearance distillation (paper, section 3.2, algorithm 1)."""

    perceptual_weight: float = 2.0
    sharpness_weight: float = 0.0
    """As that of phase `mover`."""
    adversarial_weight: float = 0.05
    adversarial_from_step: int = 3000
    """T; the paper starts at once. Both have a discriminator that has seen faces before."""
    critic_from_step: int = 1000
    """T: 5000, behind the previous one. Ours starts from nothing, so that it must learn before it is heard."""
    critic_channels: int = 512
    """Most channels of the discriminator."""
    lpips_vgg: str | None = None
    """torchvision's VGG16 weights and, next, lpips' linear layers; without both, `training.perceptual.substitute`."""
    lpips_linear: str | None = None
    recompute: bool = False
    """True: pictures are decoded one by one, and again for their gradients, for a fraction of the memory (T in stage 3:
    at full size a window's do not fit)."""
    portrait_start: bool = False
    """True: new frames enter as the noised portrait, as in inference (T's inference code); False: as noise (P, T)."""


@dataclass(frozen=True)
class StreamConfig(DistillConfig):
    """Sliding training of the temporal modules (paper, section 3.3, algorithm 2). Its discriminator is the one that
    `distill` has left."""

    adversarial_from_step: int = 50
    critic_from_step: int = 50
    """T."""
    gradient_every: int = 3
    """Windows per update: 3 of the 7 windows of a 40-frame clip are learned from."""
    sliding: bool = True
    """False: only the first window, from true noised latents (the paper's `w/o ST`)."""
    renoise: bool = True
    """True: fresh noise between levels (P, T); False: the deterministic step of inference."""


@dataclass(frozen=True)
class Recipe:
    """A whole training: a model and what each phase does to it."""

    name: str
    model: ModelConfig
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    keypoints: KeypointsConfig = field(default_factory=KeypointsConfig)
    mover: MoverConfig = field(default_factory=MoverConfig)
    motion: MotionConfig = field(default_factory=MotionConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    stream: StreamConfig = field(default_factory=StreamConfig)
    seed: int = 0

    def phase(self, name: str) -> PhaseConfig:
        """The config of a phase. Raises BadConfig for an unknown one."""
        if name not in PHASES:
            raise BadConfig(f"phase {name!r} is unknown: give one of {', '.join(PHASES)}")
        config: PhaseConfig = getattr(self, name)
        return config


def official() -> Recipe:
    """Full size, 512x512: from the weights given (the released ones, or their ancestors'), on 8 GPUs (P: batch 32)."""
    # T trains 50 000 steps; the paper's tables come from the paper's 30 000, so those are the default.
    still = Sampling(num_frames=1, kind="spread", margin=30)
    clip = Sampling(num_frames=40, kind="run", stride=4)
    temporal: dict[str, Any] = {
        "trained": ("denoising_unet",), "trained_parts": ("temporal_modules",), "frozen_parts": ()
    }  # fmt: skip
    return Recipe(
        name="official",
        model=ModelConfig(),
        motion=MotionConfig(num_steps=30_000, batch_size=4, sampling=still),
        distill=DistillConfig(num_steps=30_000, batch_size=4, sampling=still),
        stream=StreamConfig(num_steps=10_000, batch_size=1, sampling=clip, recompute=True, **temporal),
    )


def tiny_model() -> ModelConfig:
    """The bundled model: live at 256x256 on two CPU cores."""
    return ModelConfig(
        name="tiny",
        licence="Apache-2.0",
        size_px=256,
        unet=UNetConfig(
            in_channels=80,
            block_channels=(64, 80),
            attention_levels=(False, True),
            layers_per_block=1,
            num_heads=2,
            cross_attention_dim=32,
            num_norm_groups=8,
            num_motion_heads=2,
            num_temporal_heads=2,
            max_positions=16,
            motion_in_time=True,
            num_bases=2,
        ),
        motion_encoder=MotionEncoderConfig(
            crop_px=64,
            stem_channels=16,
            mid_channels=24,
            trunk_channels=32,
            num_landmarks=24,
            attention_dim=64,
            num_attention_heads=4,
            num_norm_groups=8,
            hourglass_depth=2,
            num_tokens=16,
            token_dim=16,
        ),
        keypoints=KeypointConfig(
            image_px=256,
            depths=(1, 1, 3, 1),
            dims=(48, 96, 192, 192),
            radius_px=6,
            gathered_cells=4,
            fine_channels=32,
            upright_channels=(16, 32, 64, 96),
            upright_depths=(0, 2, 2, 2),
        ),
        # The canvas shows the moved portrait: what is left to draw is what a small model can learn in an hour.
        pose_guider=PoseGuiderConfig(
            channels=(32, 64, 96),
            pixel_patch=4,
            shows_portrait=True,
            mover_channels=(64, 128),
            expression_channels=(48, 64),
            depth_channels=(32, 64),
            light_channels=(24, 48),
        ),
        # One resolution of 8x8 squares, so that it can start as their principal components.
        vae=VaeConfig(
            block_channels=(96,),
            layers_per_block=1,
            latent_channels=20,
            num_norm_groups=16,
            mid_attention=False,
            scaling_factor=1.0,
            pixel_patch=8,
            latent_patch=2,
            plain_output=True,
            kept_detail=0.5,
        ),
        image_encoder=ImageEncoderConfig(
            image_px=64, patch_px=16, hidden_dim=48, intermediate_dim=96, num_layers=2, num_heads=4, projection_dim=32
        ),
        window=WindowConfig(prediction="sample", keyframe_threshold=TINY_KEYFRAME_THRESHOLD),
        cpu_bfloat16=True,
    )


TINY_KEYFRAME_THRESHOLD = 6.5
"""In the scale of `training.known.token_map`: about two frames in a minute of talking lie further than this from the
portrait's motion and from each other."""


def _quick(learning_rate: float, ema_decay: float = 0.0, critic_learning_rate: float = 2e-3) -> OptimiserConfig:
    """For networks that start from nothing and have hours, not days."""
    return OptimiserConfig(
        learning_rate=learning_rate,
        critic_learning_rate=critic_learning_rate,
        betas=(0.9, 0.99),
        num_warmup_steps=100,
        schedule="cosine",
        ema_decay=ema_decay,
    )


def tiny() -> Recipe:
    """The bundled model, from nothing, on drawn people: some sixteen hours of one processor core in all."""
    poses, run = Sampling(num_frames=7, kind="spread"), Sampling(num_frames=28, kind="run")
    # What moves a portrait is learned by more people rather than by more frames of each.
    portraits = Sampling(num_frames=3, kind="spread")
    # No guidance at inference, so nothing is dropped; true poses and expressions stand in for extractors that are
    # trained beside this, disturbed by as much as those are wrong.
    given: dict[str, Any] = {
        "drop_reference": 0.0, "drop_pose": 0.0, "drop_motion": 0.0, "drop_reference_tokens": 0.1, "poses": "truth",
        "expressions": "truth", "pose_noise": 0.1, "portrait_noise": 0.5, "augment": 0.0, "face_weight": 4.0,
        "parts_weight": 4.0,
        "frozen_parts": ("temporal_modules", "pose_guider.base.", "pose_guider.mover."), "checkpoint_every": 200,
        "trained": ("reference_unet", "denoising_unet", "pose_guider"),
    }  # fmt: skip
    appearance: dict[str, Any] = {
        "adversarial_weight": 0.03, "critic_channels": 32, "portrait_start": True, "sharpness_weight": 0.01,
    }  # fmt: skip
    # At the fine level they would take a fifth of a call.
    coarse_in_time = ("down_blocks.0.temporal_modules", "up_blocks.1.temporal_modules")
    return Recipe(
        name="tiny",
        model=tiny_model(),
        autoencoder=AutoencoderConfig(
            num_steps=300, batch_size=2, sampling=poses, optimiser=_quick(3e-4), latent_noise=0.02,
            gradient_weight=0.5, checkpoint_every=200,
        ),
        keypoints=KeypointsConfig(
            num_steps=24_000, batch_size=4, sampling=poses, optimiser=_quick(1.5e-3, 0.998), mild_share=0.8,
            checkpoint_every=200,
        ),
        mover=MoverConfig(
            num_steps=8000, batch_size=4, sampling=portraits, optimiser=_quick(1.4e-3, 0.995), checkpoint_every=200,
            picture_weight=2.0, absolute_weight=0.3, perceptual_weight=1.0, face_weight=4.0,
            parts_weight=6.0, sharpness_weight=0.01,
            **{name: given[name] for name in ("poses", "expressions", "pose_noise", "portrait_noise", "augment",
            "drop_reference")},
        ),
        motion=MotionConfig(
            num_steps=8000, batch_size=2, sampling=poses, optimiser=_quick(8e-4, 0.999), timesteps="levels",
            level_shares=(0.05, 0.15, 0.2, 0.6), noise_offset=0.0, absolute_weight=0.3, **given,
        ),
        distill=DistillConfig(
            num_steps=6500, batch_size=1, sampling=poses, optimiser=_quick(9e-4, 0.995), perceptual_weight=2.5,
            critic_from_step=4900, adversarial_from_step=5000, **appearance,
            **given | {"face_weight": 5.0, "parts_weight": 5.0, "pose_noise": 0.25},
        ),
        stream=StreamConfig(
            num_steps=220, batch_size=1, sampling=run, optimiser=_quick(4e-4, 0.99, 1e-3), perceptual_weight=2.0,
            critic_from_step=0, adversarial_from_step=20, **appearance,
            **given | {"trained": ("denoising_unet",), "frozen_parts": coarse_in_time},
        ),
    )  # fmt: skip


def smoke_model() -> ModelConfig:
    """A very small model of the same parts, 64x64, two frames a chunk and three levels."""
    return ModelConfig(
        name="smoke",
        licence="Apache-2.0",
        size_px=64,
        unet=UNetConfig(
            in_channels=24,
            block_channels=(16, 24),
            attention_levels=(False, True),
            layers_per_block=1,
            num_heads=2,
            cross_attention_dim=12,
            num_norm_groups=4,
            num_motion_heads=1,
            num_temporal_heads=2,
            max_positions=6,
            motion_in_time=True,
            num_bases=2,
        ),
        motion_encoder=MotionEncoderConfig(
            crop_px=32,
            stem_channels=8,
            mid_channels=12,
            trunk_channels=16,
            num_landmarks=10,
            attention_dim=16,
            num_attention_heads=2,
            num_norm_groups=4,
            hourglass_depth=2,
            num_tokens=5,
            token_dim=12,
        ),
        keypoints=KeypointConfig(
            image_px=64,
            depths=(1, 1, 2, 1),
            dims=(8, 12, 16, 24),
            radius_px=2,
            fine_channels=4,
            upright_channels=(4, 6),
            upright_depths=(0, 1),
            upright_px=32,
        ),
        pose_guider=PoseGuiderConfig(
            channels=(12, 16),
            pixel_patch=4,
            shows_portrait=True,
            mover_channels=(8, 12),
            expression_channels=(8, 12),
            depth_channels=(8, 12),
            light_channels=(4, 6),
        ),
        vae=VaeConfig(
            block_channels=(24,),
            layers_per_block=1,
            latent_channels=6,
            num_norm_groups=4,
            mid_attention=False,
            scaling_factor=1.0,
            pixel_patch=4,
            latent_patch=2,
            plain_output=True,
            kept_detail=0.5,
        ),
        image_encoder=ImageEncoderConfig(
            image_px=32, patch_px=16, hidden_dim=16, intermediate_dim=24, num_layers=1, num_heads=2, projection_dim=12
        ),
        window=WindowConfig(chunk_frames=2, timesteps=(0, 500, 999), prediction="sample"),
    )


def smoke() -> Recipe:
    """Every phase of a very small model, discriminator and extractors among what is trained: some minutes in all."""
    tiny_recipe = tiny()
    often: dict[str, Any] = {"checkpoint_every": 5, "log_every": 5}
    learned: dict[str, Any] = often | {
        "poses": "extractor", "expressions": "encoder", "augment": 1.0, "drop_reference": 0.1, "drop_pose": 0.1,
        "drop_motion": 0.1, "drop_reference_tokens": 0.3,
    }  # fmt: skip
    critic = {"adversarial_weight": 0.05, "adversarial_from_step": 3, "critic_from_step": 2, "critic_channels": 8}
    appearance: dict[str, Any] = learned | critic
    run = Sampling(num_frames=12, kind="run")
    moved = ("reference_unet", "denoising_unet", "pose_guider", "motion_encoder")
    return Recipe(
        name="smoke",
        model=smoke_model(),
        autoencoder=dataclasses.replace(tiny_recipe.autoencoder, num_steps=20, **often),
        keypoints=dataclasses.replace(tiny_recipe.keypoints, num_steps=20, **often),
        mover=dataclasses.replace(tiny_recipe.mover, num_steps=20, poses="extractor", expressions="encoder", **often),
        motion=dataclasses.replace(tiny_recipe.motion, num_steps=20, level_shares=(), trained=moved, **learned),
        distill=dataclasses.replace(tiny_recipe.distill, num_steps=10, trained=moved, **appearance),
        stream=dataclasses.replace(tiny_recipe.stream, num_steps=5, sampling=run, **appearance),
    )


RECIPES: dict[str, Callable[[], Recipe]] = {"official": official, "tiny": tiny, "smoke": smoke}


def find_recipe(name: str, overrides: dict[str, Any] | None = None) -> Recipe:
    """The recipe `name`, changed by overrides such as {"motion.num_steps": 10}. Raises BadConfig, naming what is."""
    if name not in RECIPES:
        raise BadConfig(f"recipe {name!r} is unknown: give one of {', '.join(RECIPES)}")
    return changed(RECIPES[name](), overrides or {})


def changed(recipe: Recipe, overrides: dict[str, Any]) -> Recipe:
    """The recipe with fields replaced by dotted name. Raises BadConfig for an unknown field or a wrong type."""
    values = json.loads(json.dumps(dataclasses.asdict(recipe)))
    for name, value in overrides.items():
        place = values
        *way, last = name.split(".")
        for part in way:
            place = place.get(part) if isinstance(place, dict) else None
        if not isinstance(place, dict) or last not in place:
            raise BadConfig(f"recipe {recipe.name} has no field {name!r}")
        place[last] = value
    return checked(from_dict(Recipe, values, "recipe"))


def checked(recipe: Recipe) -> Recipe:
    """The recipe. Raises BadConfig, naming the field, where a number makes no sense."""
    for name in PHASES:
        check_phase(name, recipe.phase(name), recipe.model.window.num_levels)
    return recipe
