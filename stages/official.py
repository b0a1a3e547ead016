"""The one file that knows the authors' weights folder: its files, its tensor names and its configs.

    sd-image-variations-diffusers/unet/            config.json, diffusion_pytorch_model.{safetensors,bin}
    sd-image-variations-diffusers/image_encoder/   config.json, {model.safetensors,pytorch_model.bin}
    sd-vae-ft-mse/                                 config.json, diffusion_pytorch_model.{safetensors,bin}
    personalive/                                   {denoising_unet,reference_unet,motion_encoder,motion_extractor,
                                                   pose_guider,temporal_module}.{safetensors,pth}

Called by `stages.pipeline` and `stages.convert`. Specification, section 2.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stages.config import ModelConfig, VaeConfig, from_dict, read_object
from stages.errors import BadConfig, BadWeights
from stages.networks.unet import ReferenceUNet
from stages.weights import build_network, fill_network, load_tensors

BASE_UNET = "sd-image-variations-diffusers/unet"
IMAGE_ENCODER = "sd-image-variations-diffusers/image_encoder"
VAE = "sd-vae-ft-mse"
PERSONALIVE = "personalive"

LICENCE = (
    "PersonaLive's weights are for academic research only and descend from X-NeMo's (CC BY-NC 4.0) and Stable "
    "Diffusion's (CreativeML OpenRAIL-M); read WEIGHTS.md before using them"
)

# Attention to a single token does not depend on its queries, keys or norm; positions are computed.
DEAD_IN_UNETS = re.compile(r"\.(norm2\.(weight|bias)|attn2\.to_[qk]\.weight|pos_encoder\.pe)$")
RESNET_NORM2 = re.compile(r"resnets\.\d+\.norm2\.")
DEAD_IN_EXTRACTOR = re.compile(r"^(idx_tensor|fc_exp\.(weight|bias))$")
OLD_VAE_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def is_official(folder: Path) -> bool:
    """Whether a folder has the authors' layout."""
    return (folder / PERSONALIVE).is_dir()


def load_official(folder: Path, names: Collection[str], size_px: int = 512) -> tuple[ModelConfig, dict[str, nn.Module]]:
    """The config and the named networks of an official folder. Raises BadWeights or BadConfig."""
    config = official_config(folder, size_px)
    return config, {name: load_official_network(folder, name, config) for name in names}


def load_official_network(folder: Path, name: str, config: ModelConfig) -> nn.Module:
    """One network of an official folder that has this config. Raises BadWeights or BadConfig."""
    network = build_network(name, config)
    return fill_network(name, network, READERS[name](folder, network), str(folder))


def official_config(folder: Path, size_px: int = 512) -> ModelConfig:
    """Our config, from the folder's config files and, for the pose guider, its tensors' shapes.

    The folder does not say for which picture size it is; the authors use 512. Raises BadWeights or BadConfig.
    """
    values = {
        "name": "personalive-official",
        "licence": LICENCE,
        "size_px": size_px,
        "unet": _unet_values(_read_json(folder / BASE_UNET / "config.json")),
        "vae": _vae_values(_read_json(folder / VAE / "config.json")),
        "image_encoder": _image_encoder_values(_read_json(folder / IMAGE_ENCODER / "config.json")),
        "pose_guider": _pose_guider_values(_read_any(folder / PERSONALIVE, "pose_guider")),
    }
    return from_dict(ModelConfig, values, str(folder))


def _unet_values(values: dict[str, Any]) -> dict[str, Any]:
    return {
        "in_channels": values["in_channels"],
        "block_channels": values["block_out_channels"],
        "attention_levels": [str(kind).startswith("CrossAttn") for kind in values["down_block_types"]],
        "layers_per_block": values["layers_per_block"],
        # Stable Diffusion 1 calls the number of heads "attention_head_dim".
        "num_heads": values["attention_head_dim"],
        "cross_attention_dim": values["cross_attention_dim"],
        "num_norm_groups": values["norm_num_groups"],
    }


def _vae_values(values: dict[str, Any]) -> dict[str, Any]:
    return {
        "block_channels": values["block_out_channels"],
        "layers_per_block": values["layers_per_block"],
        "latent_channels": values["latent_channels"],
        "num_norm_groups": values["norm_num_groups"],
        "scaling_factor": values.get("scaling_factor", VaeConfig.scaling_factor),
    }


def _image_encoder_values(values: dict[str, Any]) -> dict[str, Any]:
    return {
        "image_px": values["image_size"],
        "patch_px": values["patch_size"],
        "hidden_dim": values["hidden_size"],
        "intermediate_dim": values["intermediate_size"],
        "num_layers": values["num_hidden_layers"],
        "num_heads": values["num_attention_heads"],
        "projection_dim": values["projection_dim"],
        "hidden_act": values["hidden_act"],
        "norm_eps": values["layer_norm_eps"],
    }


def _pose_guider_values(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The halving convolutions are every second one; their output widths are the config's channels."""
    names = ["conv_in.weight", *(f"blocks.{index}.weight" for index in range(1, len(tensors), 2))]
    return {"channels": [tensors[name].shape[0] for name in names if name in tensors]}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return _Required(read_object(path), path)
    except FileNotFoundError:
        raise BadWeights(f"{path} is missing: download the whole folder, see WEIGHTS.md") from None


class _Required(dict[str, Any]):
    """A config file's values; a missing one raises BadConfig with the file's name."""

    def __init__(self, values: dict[str, Any], path: Path):
        super().__init__(values)
        self.path = path

    def __missing__(self, key: str) -> Any:
        raise BadConfig(f"{self.path} lacks {key!r}: download it again, see WEIGHTS.md")


def _read_any(folder: Path, *stems: str) -> dict[str, Tensor]:
    """The tensors of the first file that exists, safetensors before pickles. Raises BadWeights."""
    paths = [folder / f"{stem}{suffix}" for suffix in (".safetensors", ".bin", ".pth") for stem in stems]
    for path in paths:
        if path.exists():
            return load_tensors(path) if path.suffix == ".safetensors" else _unpickle(path)
    wanted = ", ".join(path.name for path in paths)
    raise BadWeights(f"{folder} has none of {wanted}: download the whole folder, see WEIGHTS.md")


def _unpickle(path: Path) -> dict[str, Tensor]:
    """A flat {name: tensor} pickle, without running any code that is in it."""
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise anything
        raise BadWeights(
            f"{path} is not a file of tensors only: {_refusal(error)}. It is not opened otherwise: download it again, "
            "see WEIGHTS.md"
        ) from None
    entries = tensors.items() if isinstance(tensors, dict) else [(None, None)]
    if not all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in entries):
        raise BadWeights(f"{path} does not hold a flat dictionary of tensors: download it again, see WEIGHTS.md")
    return tensors


def _refusal(error: Exception) -> str:
    """Why torch did not open a pickle, in our words: torch's own text advises to open it unsafely."""
    code = re.search(r"unsupported (?:global: )?GLOBAL ([\w.]{1,100})", str(error), re.IGNORECASE)
    if code:
        return f"it asks to run {code[1]}, which is code"
    is_pickle = isinstance(error, pickle.UnpicklingError) and "nsupported operand" not in str(error)
    return "it asks for more than tensors" if is_pickle else "it is damaged, or of another kind"


def _read_denoising_unet(folder: Path, network: nn.Module) -> dict[str, Tensor]:
    """Base UNet, then denoising_unet, then temporal_module: whatever comes last wins, any split will do."""
    tensors = _read_any(folder / BASE_UNET, "diffusion_pytorch_model")
    tensors |= _read_any(folder / PERSONALIVE, "denoising_unet")
    tensors |= _read_any(folder / PERSONALIVE, "temporal_module")
    return _alive(tensors)


def _read_reference_unet(folder: Path, network: nn.Module) -> dict[str, Tensor]:
    """Nothing behind the last features has an effect, so it does not exist in our network."""
    assert isinstance(network, ReferenceUNet)
    tensors = _alive(_read_any(folder / PERSONALIVE, "reference_unet"))
    expected, last = network.state_dict().keys(), len(network.up_blocks) - 1
    return {name: tensor for name, tensor in tensors.items() if name in expected or _up_block(name) < last}


def _up_block(name: str) -> int:
    """Number of the up block a tensor is in, -1 if it is in none."""
    return int(name.split(".")[1]) if name.startswith("up_blocks.") else -1


def _alive(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the tensors that cannot influence a result."""
    return {
        name: tensor for name, tensor in tensors.items() if RESNET_NORM2.search(name) or not DEAD_IN_UNETS.search(name)
    }


def _read_motion_extractor(folder: Path, network: nn.Module) -> dict[str, Tensor]:
    tensors = _read_any(folder / PERSONALIVE, "motion_extractor")
    renamed = {name.removeprefix("detector."): tensor for name, tensor in tensors.items()}
    return {name: tensor for name, tensor in renamed.items() if not DEAD_IN_EXTRACTOR.search(name)}


def _read_vae(folder: Path, network: nn.Module) -> dict[str, Tensor]:
    """Accepts both generations of attention names, and linear layers stored as 1x1 convolutions."""
    tensors = _read_any(folder / VAE, "diffusion_pytorch_model")
    return dict(_new_vae_name(name, tensor) for name, tensor in tensors.items())


def _new_vae_name(name: str, tensor: Tensor) -> tuple[str, Tensor]:
    if ".attentions." not in name:
        return name, tensor
    parts = [OLD_VAE_NAMES.get(part, part) for part in name.split(".")]
    return ".".join(parts), tensor[:, :, 0, 0] if tensor.ndim == 4 else tensor


def _read_image_encoder(folder: Path, network: nn.Module) -> dict[str, Tensor]:
    tensors = _read_any(folder / IMAGE_ENCODER, "model", "pytorch_model")
    return {name: tensor for name, tensor in tensors.items() if not name.endswith("position_ids")}


def _read_plain(stem: str) -> Callable[[Path, nn.Module], dict[str, Tensor]]:
    return lambda folder, network: _read_any(folder / PERSONALIVE, stem)


READERS: dict[str, Callable[[Path, nn.Module], dict[str, Tensor]]] = {
    "keypoint_extractor": _read_motion_extractor,
    "motion_encoder": _read_plain("motion_encoder"),
    "vae": _read_vae,
    "image_encoder": _read_image_encoder,
    "reference_unet": _read_reference_unet,
    "pose_guider": _read_plain("pose_guider"),
    "denoising_unet": _read_denoising_unet,
}
