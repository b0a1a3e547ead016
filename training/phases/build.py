"""From a phase's name to the phase: which networks it needs, how fresh ones start. Called by the engine's wiring."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import nn

from stages.config import ModelConfig
from stages.errors import BadWeights
from stages.images import signed
from stages.messages import Pixels
from stages.networks.keypoint_extractor import KeypointExtractor
from stages.networks.motion_encoder import MotionEncoder
from stages.networks.pose_guider import PoseGuider
from stages.networks.unet import DenoisingUNet
from stages.networks.vae import Vae
from stages.weights import load_tensors
from training.critic import Critic
from training.identity import sample_identity
from training.motion import sample_motion
from training.perceptual import load_perceptual
from training.phases import animation, keypoints, mover
from training.phases.autoencoder import AutoencoderPhase, start_as_components
from training.phases.distill import DistillPhase
from training.phases.keypoints import KeypointsPhase, prime_bottleneck
from training.phases.motion import MotionPhase
from training.phases.mover import MoverPhase
from training.phases.phase import Phase
from training.phases.stream import StreamPhase
from training.recipes import DistillConfig, Recipe
from training.world import render

CRITIC = "critic"
"""Its file in a weights folder, beside the networks."""
NUM_COMPONENT_PEOPLE = 48
"""People drawn for what starts as a linear map: a number of patches far above that of their pixels."""
RIDGE = 1e-2


def networks_of(phase: str) -> tuple[str, ...]:
    """Names of the networks that a phase needs, trained or not."""
    own = {"autoencoder": ("vae",), "keypoints": keypoints.NETWORKS, "mover": mover.NETWORKS}
    return own.get(phase, animation.NETWORKS)


def build_phase(
    name: str, recipe: Recipe, networks: dict[str, nn.Module], device: torch.device, weights: Path | None = None
) -> Phase:
    """The phase with its networks on a device, frozen where the config says, and its discriminator where it has one:
    that of `weights`, where there is one in it."""
    config, model = recipe.phase(name), recipe.model
    for network in networks.values():
        network.to(device)
    if name == "autoencoder":
        return AutoencoderPhase(model, recipe.autoencoder, networks)
    if name == "keypoints":
        return KeypointsPhase(model, recipe.keypoints, networks).to(device)
    if name == "mover":
        perceptual = load_perceptual(None, None) if recipe.mover.perceptual_weight else None
        return MoverPhase(model, recipe.mover, networks, perceptual).to(device)
    guider, vae = networks["pose_guider"], networks["vae"]
    assert isinstance(guider, PoseGuider) and isinstance(vae, Vae)
    fit_base(guider, vae, model)
    if name == "motion":
        return MotionPhase(model, recipe.motion, networks)
    assert isinstance(config, DistillConfig)
    kind = StreamPhase if name == "stream" else DistillPhase
    files = [Path(path) if path else None for path in (config.lpips_vgg, config.lpips_linear)]
    perceptual = load_perceptual(*files) if config.perceptual_weight else None
    critic = make_critic(config, model, recipe.seed, weights) if config.adversarial_weight else None
    return kind(model, config, networks, perceptual, critic).to(device)


def make_critic(config: DistillConfig, model: ModelConfig, seed: int, weights: Path | None) -> Critic:
    """The discriminator that an earlier phase has left in `weights`, or one that is drawn from the seed. Raises
    BadWeights for one of another size."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)
        critic = Critic(model.size_px, config.critic_channels)
    path = weights / f"{CRITIC}.safetensors" if weights else None
    if path and path.exists():
        try:
            critic.load_state_dict(load_tensors(path))
        except RuntimeError as error:
            raise BadWeights(
                f"{path} is not a discriminator for {model.size_px} px with critic_channels "
                f"{config.critic_channels}: set those it was trained with, or remove it"
            ) from error
    return critic


def _start_vae(network: nn.Module, model: ModelConfig) -> None:
    assert isinstance(network, Vae)
    if not (model.vae.plain_output and len(model.vae.block_channels) == 1):
        return
    start_as_components(network, drawn_people(model.size_px))


def _start_extractor(network: nn.Module, model: ModelConfig) -> None:
    """Cells that are weighed one by one start as their mean."""
    assert isinstance(network, KeypointExtractor)
    if network.gather is not None:
        weight = network.gather.weight.data
        weight.copy_(torch.eye(len(weight))[:, :, None, None] / weight[0, 0].numel())
        nn.init.zeros_(network.gather.get_parameter("bias"))


def _start_motion_encoder(network: nn.Module, model: ModelConfig) -> None:
    assert isinstance(network, MotionEncoder)
    prime_bottleneck(network, model.motion_encoder)


def _start_denoiser(network: nn.Module, model: ModelConfig) -> None:
    """Temporal modules start as the identity, so that an image model becomes a video model without a step back. And
    where the pose brings a first answer, nothing is added to it."""
    assert isinstance(network, DenoisingUNet)
    if model.unet.num_bases:
        nn.init.zeros_(network.conv_out.weight)
        network.conv_out.get_parameter("bias").data.zero_()
    for name, parameter in network.named_parameters():
        if "temporal_modules" in name and "temporal_transformer.proj_out" in name:
            nn.init.zeros_(parameter)


def _start_guider(network: nn.Module, model: ModelConfig) -> None:
    """What the moved portrait is in latents is measured when the autoencoder is known (`fit_base`)."""
    assert isinstance(network, PoseGuider)
    if network.base is not None:
        nn.init.zeros_(network.base.weight)


STARTS: dict[str, Callable[[nn.Module, ModelConfig], None]] = {
    "vae": _start_vae, "motion_encoder": _start_motion_encoder, "denoising_unet": _start_denoiser,
    "pose_guider": _start_guider, "keypoint_extractor": _start_extractor,
}  # fmt: skip


def fit_base(guider: PoseGuider, vae: Vae, model: ModelConfig) -> None:
    """Makes the guider's `base` the linear map from pictures to this autoencoder's latents, by least squares over
    people of the world; in place, unless it has been fitted before."""
    if guider.base is None or guider.base.weight.any():
        return
    images = signed(drawn_people(model.size_px))
    patch = guider.base.kernel_size[0]
    with torch.no_grad():
        latents = rearrange(vae.encode(images), "n c h w -> (n h w) c").double()
        pixels = rearrange(images / 2 + 0.5, "n c (h p) (w q) -> (n h w) (c p q)", p=patch, q=patch).double()
        known = torch.cat([pixels, torch.ones_like(pixels[:, :1])], 1)
        ridge = RIDGE * torch.eye(known.shape[1], dtype=torch.float64)
        solved = torch.linalg.solve(known.T @ known + ridge, known.T @ latents).float()
        guider.base.weight.copy_(rearrange(solved[:-1], "(c p q) o -> o c p q", p=patch, q=patch))
        guider.base.get_parameter("bias").copy_(solved[-1])


@lru_cache(maxsize=2)
def drawn_people(size_px: int) -> Pixels:
    """Pictures (NUM_COMPONENT_PEOPLE, s, s, 3) of people of the world, always the same."""
    rng = np.random.default_rng(17)
    people = (sample_identity(seed) for seed in range(NUM_COMPONENT_PEOPLE))
    return np.stack([render(one, sample_motion(rng), size_px) for one in people])


def start_fresh(name: str, network: nn.Module, model: ModelConfig) -> nn.Module:
    """Puts a randomly initialised network where its training had better start; returns it."""
    if name in STARTS:
        STARTS[name](network, model)
    return network
