"""Loading the stages, and running all four in one process: the offline tool, and the slow twin of every other way.

Called by `stages.animate`, the members (`cluster.member`, for the stages they host) and training's evaluation.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stages.allocator import keep_freed_memory
from stages.config import ModelConfig
from stages.decode import DecodeStage
from stages.denoise import DenoiseStage
from stages.errors import BadConfig, BadWeights
from stages.messages import Pixels
from stages.motion import MotionStage
from stages.networks.keypoint_extractor import KeypointExtractor
from stages.networks.layers import rest_idle_modules
from stages.networks.unet import DenoisingUNet
from stages.networks.vae import Vae
from stages.official import is_official, load_official
from stages.reference import ReferenceStage
from stages.threads import default_num_threads
from stages.weights import TINY, load_folder

logger = logging.getLogger(__name__)

STAGE_NETWORKS: dict[str, tuple[str, ...]] = {
    "motion": ("keypoint_extractor", "motion_encoder", "pose_guider"),
    "reference": ("vae", "image_encoder", "reference_unet"),
    "denoise": ("pose_guider", "denoising_unet"),
    "decode": ("vae",),
}
STAGE_CLASSES: dict[str, type[Any]] = {
    "motion": MotionStage,
    "reference": ReferenceStage,
    "denoise": DenoiseStage,
    "decode": DecodeStage,
}


@dataclass(frozen=True)
class Stages:
    """The stages of one process; those it does not host are None."""

    config: ModelConfig
    motion: Any = None
    reference: Any = None
    denoise: Any = None
    decode: Any = None


def load_stages(
    weights: str = "tiny",
    stages: Collection[str] = tuple(STAGE_NETWORKS),
    device: str = "auto",
    num_threads: int = 0,
) -> Stages:
    """The named stages with their weights on a device; sets torch's threads and the allocator for this process.

    weights: "tiny" or a folder, ours or official. device: auto, cpu, cuda, cuda:N; auto takes a GPU if there is one.
    num_threads: 0 takes `default_num_threads()`. Networks run in fp16 on a GPU; on a CPU in bfloat16 where the config's
    `cpu_bfloat16` is set and the CPU multiplies it (`runs_bfloat16`), else in fp32. So a model that sets it gives
    slightly different frames on different CPUs: unset it in `config.json` for equal ones. The keypoint extractor runs
    in fp32, but for its trunk where the others run in bfloat16: its angles are the result of a sum that fp16 rounds to
    0.06 degrees. Raises BadWeights, BadConfig.
    """
    torch.set_num_threads(num_threads or default_num_threads())
    keep_freed_memory()
    target = find_device(device)
    names = sorted({name for stage in stages for name in STAGE_NETWORKS[stage]})
    config, networks = load_networks(weights, names)
    if weights != "tiny":
        logger.warning("weights %s (%s). Licence: %s.", weights, config.name, config.licence)
    dtype = network_dtype(config, target)
    for name, network in networks.items():
        network.to(target, torch.float32 if name == "keypoint_extractor" else dtype)
        if isinstance(network, KeypointExtractor) and dtype == torch.bfloat16:
            for part in network.trunk():
                part.to(dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
        if isinstance(network, DenoisingUNet | Vae):
            rest_idle_modules(network)
    made = {stage: _make_stage(stage, config, networks) for stage in stages}
    return Stages(config, **made)


def network_dtype(config: ModelConfig, device: torch.device) -> torch.dtype:
    """What the networks run in on a device, all but (parts of) the keypoint extractor."""
    if device.type == "cuda":
        return torch.float16
    return torch.bfloat16 if config.cpu_bfloat16 and runs_bfloat16() else torch.float32


def runs_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware; elsewhere it would be slower than fp32."""
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def find_device(device: str) -> torch.device:
    """The device that `auto`, `cpu`, `cuda` or `cuda:N` means here. Raises BadConfig."""
    num_gpus = torch.cuda.device_count()
    try:
        found = torch.device(("cuda" if num_gpus else "cpu") if device == "auto" else device)
    except RuntimeError:
        raise BadConfig(f"device {device!r} is unknown: give auto, cpu, cuda or cuda:N") from None
    if found.type not in ("cpu", "cuda") or (found.type == "cuda" and (found.index or 0) >= num_gpus):
        raise BadConfig(f"device {device!r} is not here, torch sees {num_gpus} GPUs: give auto, or another device")
    return found


def load_networks(weights: str, names: Collection[str]) -> tuple[ModelConfig, dict[str, nn.Module]]:
    """Networks by name from "tiny", a folder in our format, or an official folder. Raises BadWeights, BadConfig."""
    folder = TINY if weights == "tiny" else Path(weights).expanduser()
    if not folder.is_dir():
        raise BadWeights(f"weights folder {folder} does not exist: give a folder, or `tiny` for the bundled model")
    return load_official(folder, names) if is_official(folder) else load_folder(folder, names)


def _make_stage(stage: str, config: ModelConfig, networks: dict[str, nn.Module]) -> Any:
    return STAGE_CLASSES[stage](config, *(networks[name] for name in STAGE_NETWORKS[stage]))


def animate(stages: Stages, portrait: Pixels, chunks: Iterable[Pixels], seed: int) -> Iterator[Pixels]:
    """All four stages, one after another, for one session.

    portrait uint8 (h, w, 3), square; chunks uint8 (chunk_frames, size, size, 3). Yields one decoded chunk per driving
    chunk, of the same shape; the first `num_levels - 1` are the transition from the portrait.
    """
    state = stages.motion.open(portrait)
    window = stages.denoise.open(stages.reference.open(portrait), state.portrait_tokens, seed)
    for frames in chunks:
        [(state, motion)] = stages.motion.run([state], [frames])
        [(window, clean, keyframe)] = stages.denoise.run([window], [motion])
        if keyframe is not None:
            window = stages.denoise.add_keyframe(window, stages.reference.keyframe(keyframe))
        yield stages.decode.run([clean])[0]
