"""Weights folders in the project's own format: `config.json` and one `<network>.safetensors` per network.

Called by `stages.pipeline` (to load), `stages.convert` and training (to save). The official folder is known to
`stages.official` alone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stages.config import ModelConfig, load_config, save_config
from stages.errors import BadConfig, BadWeights
from stages.networks.image_encoder import ImageEncoder
from stages.networks.keypoint_extractor import KeypointExtractor
from stages.networks.motion_encoder import MotionEncoder
from stages.networks.mover import Mover
from stages.networks.pose_guider import PoseGuider
from stages.networks.unet import DenoisingUNet, ReferenceUNet
from stages.networks.vae import Vae

NETWORKS: dict[str, Callable[[ModelConfig], nn.Module]] = {
    "keypoint_extractor": lambda config: KeypointExtractor(config.keypoints),
    "motion_encoder": lambda config: MotionEncoder(config.motion_encoder),
    "vae": lambda config: Vae(config.vae),
    "image_encoder": lambda config: ImageEncoder(config.image_encoder),
    "reference_unet": lambda config: ReferenceUNet(config.unet),
    "pose_guider": lambda config: PoseGuider(
        config.pose_guider,
        config.unet.block_channels[0],
        config.unet.num_bases and config.unet.in_channels,
        Mover(config) if config.pose_guider.mover_channels else None,
    ),
    "denoising_unet": lambda config: DenoisingUNet(config.unet, config.motion_encoder.token_dim),
}

TINY = Path(__file__).parent / "tiny"
"""The bundled weights."""

MAX_NAMED_TENSORS = 8


def build_network(name: str, config: ModelConfig) -> nn.Module:
    """A network without weights (on the meta device), to be filled by `fill_network`. Raises BadConfig."""
    try:
        with torch.device("meta"):
            return NETWORKS[name](config)
    except (ValueError, RuntimeError, ZeroDivisionError) as error:
        raise BadConfig(f"config.json: {name} cannot be built from these sizes: {error}") from None


def fill_network(name: str, network: nn.Module, tensors: Mapping[str, Tensor], where: str) -> nn.Module:
    """Gives a network its weights, checked by name and shape. Raises BadWeights."""
    expected = network.state_dict()
    check_tensors({key: tensor.shape for key, tensor in expected.items()}, tensors, f"{where} ({name})")
    mistyped = [
        key for key, tensor in tensors.items() if tensor.is_floating_point() != expected[key].is_floating_point()
    ]
    if mistyped:
        raise BadWeights(
            f"{where} ({name}) has {_listing('tensors of a wrong type', sorted(mistyped))}: convert it again"
        )
    network.load_state_dict(dict(tensors), strict=True, assign=True)
    return network.eval().requires_grad_(False)


def check_tensors(expected: Mapping[str, torch.Size], found: Mapping[str, Tensor], where: str) -> None:
    """Raises BadWeights that names every missing, unexpected and mis-shaped tensor (the first few of each)."""
    shared = expected.keys() & found.keys()
    mis_shaped = [
        f"{name} is {tuple(found[name].shape)}, should be {tuple(expected[name])}"
        for name in sorted(shared)
        if found[name].shape != expected[name]
    ]
    problems = [
        _listing("missing", sorted(expected.keys() - shared)),
        _listing("unexpected", sorted(found.keys() - shared)),
        _listing("mis-shaped", mis_shaped),
    ]
    if any(problems):
        found_out = "; ".join(filter(None, problems))
        raise BadWeights(f"{where} does not fit its config: {found_out}. Take both from one model, or convert it again")


def _listing(title: str, entries: list[str]) -> str:
    if not entries:
        return ""
    rest = f" and {len(entries) - MAX_NAMED_TENSORS} more" if len(entries) > MAX_NAMED_TENSORS else ""
    return f"{len(entries)} {title}: {', '.join(entries[:MAX_NAMED_TENSORS])}{rest}"


def load_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of one safetensors file. Raises BadWeights."""
    try:
        return load_file(path)
    except FileNotFoundError:
        raise BadWeights(f"{path} is missing: copy the whole weights folder, or convert it again") from None
    except (SafetensorError, OSError) as error:
        raise BadWeights(f"{path} is not a readable safetensors file ({error}): copy or convert it again") from None


def load_folder(folder: Path, names: Collection[str]) -> tuple[ModelConfig, dict[str, nn.Module]]:
    """The config and the named networks of a folder in our format, in the precision they are stored in."""
    config = load_config(folder)
    networks = {}
    for name in names:
        path = folder / f"{name}.safetensors"
        networks[name] = fill_network(name, build_network(name, config), load_tensors(path), str(path))
    return config, networks


def save_folder(folder: Path, config: ModelConfig, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Writes config.json and one safetensors file per network."""
    folder.mkdir(parents=True, exist_ok=True)
    save_config(config, folder)
    for name, state in tensors.items():
        save_file({key: tensor.contiguous() for key, tensor in state.items()}, folder / f"{name}.safetensors")
