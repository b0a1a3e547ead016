"""A model of very small, unequal sizes with random weights, pictures for it, and a folder in the authors' layout.

The keypoint extractor's last layers are set so that it finds a face in every picture that is not black.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from stages.config import (
    ImageEncoderConfig,
    KeypointConfig,
    ModelConfig,
    MotionEncoderConfig,
    PoseGuiderConfig,
    UNetConfig,
    VaeConfig,
    WindowConfig,
)
from stages.messages import Pixels
from stages.networks.keypoint_extractor import KeypointExtractor
from stages.networks.layers import temporal_positions
from stages.networks.unet import attention_names
from stages.pipeline import STAGE_NETWORKS, Stages, load_stages
from stages.weights import NETWORKS, save_folder

SMALL = ModelConfig(
    name="small",
    licence="for tests only",
    size_px=48,
    unet=UNetConfig(
        in_channels=12,
        block_channels=(8, 16, 24),
        attention_levels=(True, True, False),
        layers_per_block=1,
        num_heads=2,
        cross_attention_dim=10,
        num_norm_groups=4,
        num_motion_heads=1,
        num_temporal_heads=4,
        max_positions=20,
    ),
    motion_encoder=MotionEncoderConfig(
        crop_px=24,
        stem_channels=8,
        mid_channels=12,
        trunk_channels=16,
        num_landmarks=7,
        attention_dim=32,
        num_attention_heads=2,
        num_norm_groups=4,
        hourglass_depth=2,
        num_tokens=5,
        token_dim=6,
    ),
    keypoints=KeypointConfig(
        image_px=32,
        depths=(1, 2),
        dims=(10, 14),
        fine_channels=4,
        num_keypoints=9,
        drawn=(1, 3, 8, 5),
        colours=((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 0, 85)),
        radius_px=3,
    ),
    pose_guider=PoseGuiderConfig(channels=(4, 6, 10, 14)),
    vae=VaeConfig(
        block_channels=(8, 12),
        layers_per_block=1,
        latent_channels=3,
        num_norm_groups=4,
        scaling_factor=0.7,
        pixel_patch=2,
        latent_patch=2,
    ),
    image_encoder=ImageEncoderConfig(
        image_px=28, patch_px=7, hidden_dim=18, intermediate_dim=20, num_layers=2, num_heads=3, projection_dim=10
    ),
    window=WindowConfig(chunk_frames=2, timesteps=(0, 300, 650), keyframe_threshold=1e9),
)
"""Two frames a chunk, three levels; latents are (12, 6, 6), so that the coarsest maps have odd sides."""

# As the authors' folder says nothing of motion encoder, keypoint extractor and window, these stay full size.
OFFICIAL = ModelConfig(
    name="personalive-official",
    size_px=32,
    unet=UNetConfig(
        block_channels=(8, 16, 24),
        attention_levels=(True, True, False),
        layers_per_block=1,
        num_heads=2,
        cross_attention_dim=10,
        num_norm_groups=4,
    ),
    pose_guider=PoseGuiderConfig(channels=(4, 6, 10)),
    vae=VaeConfig(block_channels=(8, 12, 20), layers_per_block=1, num_norm_groups=4),
    image_encoder=ImageEncoderConfig(
        image_px=28,
        patch_px=7,
        hidden_dim=18,
        intermediate_dim=20,
        num_layers=2,
        num_heads=3,
        projection_dim=10,
        hidden_act="gelu",
        norm_eps=1e-6,
    ),
)
SMALL_OFFICIAL_NETWORKS = ("vae", "image_encoder", "reference_unet", "pose_guider", "denoising_unet")

Tensors = dict[str, Tensor]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """These networks are too small to share."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def config() -> ModelConfig:
    return SMALL


@pytest.fixture(scope="session")
def draw_picture() -> Callable[..., Pixels]:
    """draw_picture(seed, height, width): a few coloured squares with some noise on them."""

    def draw(seed: int, height: int = SMALL.size_px, width: int | None = None) -> Pixels:
        random = np.random.default_rng(seed)
        squares = random.integers(40, 215, (3, 4, 3), dtype=np.uint8)
        picture = cv2.resize(squares, (width or height, height), interpolation=cv2.INTER_CUBIC).astype(np.int64)
        return (picture + random.integers(-20, 21, picture.shape)).clip(1, 255).astype(np.uint8)

    return draw


@pytest.fixture(scope="session")
def draw_chunks(draw_picture: Callable[..., Pixels]) -> Callable[[int, int], list[Pixels]]:
    """draw_chunks(seed, count): driving chunks of the small model."""

    def draw(seed: int, count: int) -> list[Pixels]:
        frames = SMALL.window.chunk_frames
        pictures = [draw_picture(seed * 1000 + number) for number in range(count * frames)]
        return [np.stack(pictures[start : start + frames]) for start in range(0, len(pictures), frames)]

    return draw


def build(name: str, config: ModelConfig, seed: int) -> nn.Module:
    """A network none of whose weights is at its initial zero or one."""
    torch.manual_seed(seed)
    network = NETWORKS[name](config).eval().requires_grad_(False)
    for key, tensor in network.state_dict().items():
        if key.endswith("running_var"):
            tensor.mul_(torch.rand_like(tensor) + 0.5)
        elif tensor.is_floating_point() and key != "pe":
            tensor.add_(torch.randn_like(tensor) * 0.1)
    return network


def aim(extractor: KeypointExtractor, config: KeypointConfig, pictures: Tensor) -> None:
    """Sets the last layers: nearly the same face in every picture, except that in a black one it is off the picture."""
    if extractor.pinpoint is not None:
        extractor.pinpoint.read[-1].weight.mul_(0.1)
    pooled: list[Tensor] = []
    hook = extractor.fc_t.register_forward_hook(lambda module, inputs, output: pooled.append(inputs[0]))
    extractor(torch.cat([torch.zeros_like(pictures[:1]), pictures]))
    hook.remove()
    black, usual = pooled[0][0], pooled[0][1:].mean(dim=0)
    towards_black = (black - usual) / (black - usual).square().sum()
    extractor.fc_t.weight.copy_(towards_black * torch.tensor([[9.0], [0.0], [0.0]]))
    extractor.fc_t.bias.copy_(-extractor.fc_t.weight @ usual)
    angles = torch.linspace(0, 2 * torch.pi, config.num_keypoints + 1)[:-1]
    face = torch.stack([angles.cos() * 0.4, angles.sin() * 0.4, angles.sin() * 0.1], dim=-1)
    extractor.fc_kp.weight.mul_(0.1)
    extractor.fc_kp.bias.copy_(face.flatten())
    extractor.fc_scale.weight.mul_(0.1)
    extractor.fc_scale.bias.fill_(1)


@pytest.fixture(scope="session")
def networks(draw_picture: Callable[..., Pixels]) -> dict[str, nn.Module]:
    """Every network of the small model, by name."""
    made = {name: build(name, SMALL, seed) for seed, name in enumerate(NETWORKS)}
    side = SMALL.keypoints.image_px
    pictures = np.stack([draw_picture(seed, side) for seed in range(100, 116)])
    aim(made["keypoint_extractor"], SMALL.keypoints, torch.from_numpy(pictures).permute(0, 3, 1, 2) / 255)
    return made


@pytest.fixture(scope="session")
def tensors(networks: dict[str, nn.Module]) -> dict[str, Tensors]:
    """The weights of every network of the small model."""
    return {name: network.state_dict() for name, network in networks.items()}


@pytest.fixture(scope="session")
def folder(tensors: dict[str, Tensors], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model's weights folder. Read only: copy it before changing it."""
    path = tmp_path_factory.mktemp("small")
    save_folder(path, SMALL, tensors)
    return path


@pytest.fixture(scope="session")
def stages(folder: Path) -> Stages:
    """All four stages of the small model; it never adds a keyframe."""
    return load_stages(str(folder), device="cpu", num_threads=1)


@pytest.fixture(scope="session")
def keyframe_stages(stages: Stages) -> Stages:
    """The same weights with a window that makes keyframes of its first two finished chunks."""
    window = replace(SMALL.window, keyframe_threshold=1e-6, first_keyframe_call=0, max_keyframes=2)
    config = replace(SMALL, window=window)
    made = {name: replace(getattr(stages, name), config=config) for name in STAGE_NETWORKS}
    return Stages(config, **made)


@pytest.fixture(scope="session")
def showing_stages(stages: Stages) -> Stages:
    """The same weights with a pose guider whose canvases show the portrait."""
    return with_guider(stages, PoseGuiderConfig(channels=(4, 6, 10), pixel_patch=2, shows_portrait=True))


@pytest.fixture(scope="session")
def moving_stages(stages: Stages) -> Stages:
    """The same with a network that moves the portrait, whose detail decoded frames get."""
    guider = PoseGuiderConfig(
        channels=(4, 6, 10),
        pixel_patch=2,
        shows_portrait=True,
        mover_channels=(4, 8),
        expression_channels=(4, 8),
        depth_channels=(4, 8),
        light_channels=(4, 6),
    )
    return with_guider(stages, guider, kept_detail=0.25)


def with_guider(stages: Stages, guider: PoseGuiderConfig, kept_detail: float = 0.0) -> Stages:
    config = replace(SMALL, pose_guider=guider, vae=replace(SMALL.vae, kept_detail=kept_detail))
    made = {name: replace(getattr(stages, name), config=config) for name in STAGE_NETWORKS}
    network = build("pose_guider", config, 50)
    for name in ("motion", "denoise"):
        made[name] = replace(made[name], pose_guider=network)
    return Stages(config, **made)


@pytest.fixture(scope="session")
def official_config() -> ModelConfig:
    """What the folders that `write_official` writes are the weights of."""
    return OFFICIAL


@pytest.fixture(scope="session")
def official_tensors() -> dict[str, Tensors]:
    """Our weights of the networks whose sizes an official folder says."""
    return {name: build(name, OFFICIAL, seed).state_dict() for seed, name in enumerate(SMALL_OFFICIAL_NETWORKS)}


@pytest.fixture(scope="session")
def official_files(official_tensors: dict[str, Tensors]) -> dict[str, Tensors]:
    """The same weights in the authors' files, under their names, with every tensor that cannot have an effect."""
    torch.manual_seed(99)
    unet = official_tensors["denoising_unet"] | dead_in_unet(official_tensors["denoising_unet"])
    temporal = {name: tensor for name, tensor in unet.items() if ".temporal_modules." in name}
    temporal |= temporal_tables(temporal)
    rest = {name: tensor for name, tensor in unet.items() if name not in temporal}
    stock = {name: torch.randn_like(tensor) for name, tensor in rest.items() if ".motion_modules." not in name}
    reference = official_tensors["reference_unet"]
    return {
        "sd-image-variations-diffusers/unet/diffusion_pytorch_model": stock,
        "sd-image-variations-diffusers/image_encoder/pytorch_model": official_tensors["image_encoder"],
        "sd-vae-ft-mse/diffusion_pytorch_model": official_tensors["vae"],
        "personalive/denoising_unet": rest,
        "personalive/temporal_module": temporal,
        "personalive/reference_unet": reference | dead_in_unet(reference) | behind_last_features(reference),
        "personalive/pose_guider": official_tensors["pose_guider"],
    }


def dead_in_unet(unet: Tensors) -> Tensors:
    """Queries, keys and norm of the attentions to the image token."""
    found = {}
    for name in attention_names(OFFICIAL.unet):
        width = len(unet[f"{name}.norm1.weight"])
        shapes = {"norm2.weight": (width,), "norm2.bias": (width,), "attn2.to_q.weight": (width, width)}
        shapes["attn2.to_k.weight"] = (width, OFFICIAL.unet.cross_attention_dim)
        found |= {f"{name}.{key}": torch.randn(shape) for key, shape in shapes.items()}
    return found


def behind_last_features(reference: Tensors) -> Tensors:
    """What the authors' reference UNet computes after the last features it writes."""
    name = attention_names(OFFICIAL.unet)[-1]
    width = len(reference[f"{name}.norm1.weight"])
    square, vector = (width, width), (width,)
    shapes: dict[str, tuple[int, ...]] = {f"attn1.{part}.weight": square for part in ("to_q", "to_k", "to_v")}
    for part in ("attn1", "attn2"):
        shapes |= {f"{part}.to_out.0.weight": square, f"{part}.to_out.0.bias": vector}
    shapes |= {"attn2.to_v.weight": (width, OFFICIAL.unet.cross_attention_dim)}
    shapes |= {"norm3.weight": vector, "norm3.bias": vector}
    shapes |= {"ff.net.0.proj.weight": (8 * width, width), "ff.net.0.proj.bias": (8 * width,)}
    shapes |= {"ff.net.2.weight": (width, 4 * width), "ff.net.2.bias": vector}
    outer = name.removesuffix(".transformer_blocks.0")
    found = {f"{outer}.proj_out.weight": torch.randn(*square, 1, 1), f"{outer}.proj_out.bias": torch.randn(vector)}
    return found | {f"{name}.{key}": torch.randn(shape) for key, shape in shapes.items()}


def temporal_tables(temporal: Tensors) -> Tensors:
    """The position tables that the authors' temporal modules keep beside their weights."""
    suffix = ".to_q.weight"
    return {
        f"{name.removesuffix(suffix)}.pos_encoder.pe": temporal_positions(32, len(tensor))[None]
        for name, tensor in temporal.items()
        if name.endswith(suffix)
    }


OFFICIAL_JSON = {
    "sd-image-variations-diffusers/unet": {
        "in_channels": 4,
        "block_out_channels": [8, 16, 24],
        "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "layers_per_block": 1,
        "attention_head_dim": 2,
        "cross_attention_dim": 10,
        "norm_num_groups": 4,
    },
    "sd-vae-ft-mse": {
        "block_out_channels": [8, 12, 20],
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 4,
    },
    "sd-image-variations-diffusers/image_encoder": {
        "image_size": 28,
        "patch_size": 7,
        "hidden_size": 18,
        "intermediate_size": 20,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "projection_dim": 10,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
    },
}


@pytest.fixture(scope="session")
def official_writer(official_files: dict[str, Tensors]) -> Callable[..., Path]:
    """official_writer(root, changes={file: tensors or None}, safetensors=False): a folder in the authors' layout."""

    def write(root: Path, changes: dict[str, Tensors | None] | None = None, safetensors: bool = False) -> Path:
        for name, values in OFFICIAL_JSON.items():
            (root / name).mkdir(parents=True)
            (root / name / "config.json").write_text(json.dumps(values))
        (root / "personalive").mkdir()
        for stem, tensors in (official_files | (changes or {})).items():
            if tensors is None:
                continue
            if safetensors:
                path = root / f"{stem.replace('pytorch_model', 'model') if 'encoder' in stem else stem}.safetensors"
                save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
            else:
                torch.save(tensors, root / f"{stem}{'.pth' if stem.startswith('personalive') else '.bin'}")
        return root

    return write


@pytest.fixture
def write_official(official_writer: Callable[..., Path], tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """write_official(changes, safetensors): a new folder; it does not stay, since a few megabytes a test add up."""
    roots: list[Path] = []

    def write(changes: dict[str, Tensors | None] | None = None, safetensors: bool = False) -> Path:
        roots.append(tmp_path / f"official_{len(roots)}")
        return official_writer(roots[-1], changes, safetensors)

    yield write
    for root in roots:
        shutil.rmtree(root)


@pytest.fixture(scope="session")
def write_video() -> Callable[[Path, list[Pixels]], Path]:
    """write_video(path, frames): an H.264 file at 25 frames a second; sides may be odd."""

    def write(path: Path, frames: list[Pixels]) -> Path:
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=25, options={"crf": "10", "preset": "ultrafast"})
            stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], "yuv444p"
            for number, frame in enumerate(frames):
                picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
                picture.time_base, picture.pts = Fraction(1, 25), number
                container.mux(stream.encode(picture))
            container.mux(stream.encode(None))
        return path

    return write
