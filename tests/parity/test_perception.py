"""Goldens a, b, c, d, i: the networks and pictures around the denoiser, to fp32 rounding."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor, nn

from stages.config import ModelConfig
from stages.images import clip_pixels, detector_frames, portrait_tensor, signed
from stages.keypoints import (
    boxes,
    draw,
    frame_pose,
    interpolate_start,
    pose_from_raw,
    posed_keypoints,
    retarget,
)
from stages.messages import Pose
from stages.networks.image_encoder import ImageEncoder
from stages.networks.keypoint_extractor import KeypointExtractor, RawPose, degrees_from_logits
from stages.networks.motion_encoder import MotionEncoder, sinusoids
from stages.networks.pose_guider import PoseGuider
from stages.networks.vae import Vae

Golden = Callable[[str], dict[str, Tensor]]
RAW_NAMES = {"keypoints": "kp", "translation": "t", "pitch": "pitch", "yaw": "yaw", "roll": "roll", "scale": "scale"}
UNUSED = ("idx_tensor", "detector.fc_exp.weight", "detector.fc_exp.bias")


def load(network: nn.Module, path: Path, rename: dict[str, str] | None = None) -> None:
    state = {name: tensor for name, tensor in torch.load(path, weights_only=True).items() if name not in UNUSED}
    for old, new in (rename or {}).items():
        state = {name.replace(old, new): tensor for name, tensor in state.items()}
    network.load_state_dict(state)
    network.eval()


def assert_within(ours: Tensor, theirs: Tensor, atol: float) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


def by_frame(x: Tensor) -> Tensor:
    return rearrange(x, "1 c f h w -> f c h w").contiguous()


def raw_pose(tensors: dict[str, Tensor], prefix: str) -> RawPose:
    return RawPose(**{ours: tensors[f"{prefix}.{theirs}"] for ours, theirs in RAW_NAMES.items()})


@pytest.fixture(scope="module")
def extractor(config: ModelConfig, weights_dir: Path) -> KeypointExtractor:
    network = KeypointExtractor(config.keypoints)
    load(network, weights_dir / "personalive" / "motion_extractor.pth", {"detector.": ""})
    return network


@pytest.fixture(scope="module")
def vae(config: ModelConfig, weights_dir: Path) -> Vae:
    network = Vae(config.vae)
    names = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
    load(network, weights_dir / "sd-vae-ft-mse" / "diffusion_pytorch_model.bin", names)
    return network


@pytest.fixture(scope="module")
def image_encoder(config: ModelConfig, weights_dir: Path) -> ImageEncoder:
    network = ImageEncoder(config.image_encoder)
    load(network, weights_dir / "sd-image-variations-diffusers" / "image_encoder" / "pytorch_model.bin")
    return network


@pytest.mark.golden("a_motion_encoder", "input", "output")
def test_motion_encoder(config: ModelConfig, weights_dir: Path, golden: Golden):
    network = MotionEncoder(config.motion_encoder)
    load(network, weights_dir / "personalive" / "motion_encoder.pth")
    stored = golden("a_motion_encoder")
    assert_within(network(by_frame(stored["input"])), stored["output"][0], 5e-5)


@pytest.mark.golden("a_motion_encoder", "pe")
def test_motion_token_positions_follow_the_formula(config: ModelConfig, golden: Golden):
    table = sinusoids(config.motion_encoder.num_tokens, config.motion_encoder.token_dim)
    assert_within(table, golden("a_motion_encoder")["pe"][0], 1e-7)


def detect(extractor: KeypointExtractor, frames: Tensor, config: ModelConfig) -> RawPose:
    return extractor(detector_frames(signed(frames.numpy()), config.keypoints.image_px))


@pytest.mark.golden("b_motion_extractor", "dri_frames_u8", "det.kp", "degrees", "get_kp")
def test_keypoint_extractor_on_driving_frames(extractor: KeypointExtractor, config: ModelConfig, golden: Golden):
    stored = golden("b_motion_extractor")
    raw = detect(extractor, stored["dri_frames_u8"], config)
    for ours, theirs in RAW_NAMES.items():
        assert_within(getattr(raw, ours), stored[f"det.{theirs}"], 1e-5)
    pose = pose_from_raw(raw)
    assert_within(torch.from_numpy(pose.degrees).T, stored["degrees"], 1e-4)
    assert_within(posed_keypoints(pose), stored["get_kp"], 1e-5)


@pytest.mark.golden("b_motion_extractor", "dri", "dri_frames_u8")
def test_driving_frames_are_resized_for_the_extractor(config: ModelConfig, golden: Golden):
    stored = golden("b_motion_extractor")
    frames = detector_frames(signed(stored["dri_frames_u8"].numpy()), config.keypoints.image_px)
    assert_within(frames[: len(stored["dri"])], stored["dri"], 1e-6)


@pytest.mark.golden("b_motion_extractor", "ref", "kps_ref.kp")
def test_keypoint_extractor_on_the_portrait(extractor: KeypointExtractor, golden: Golden):
    stored = golden("b_motion_extractor")
    raw = extractor(stored["ref"])
    for ours, theirs in RAW_NAMES.items():
        assert_within(getattr(raw, ours), stored[f"kps_ref.{theirs}"], 1e-5)


@pytest.mark.golden("b_motion_extractor", "det.kp", "degrees")
def test_degrees_of_the_stored_logits(golden: Golden):
    stored = golden("b_motion_extractor")
    for row, name in zip(stored["degrees"], ("pitch", "yaw", "roll"), strict=True):
        assert_within(degrees_from_logits(stored[f"det.{name}"]), row, 1e-4)


def join(*poses: Pose) -> Tensor:
    return torch.cat([posed_keypoints(pose) for pose in poses])


@pytest.mark.golden("b_motion_extractor", "kps_ref.kp", "dri_frames_u8", "interp_online", "interp_online_dri")
def test_first_call_leads_from_the_portrait_to_the_driver(
    extractor: KeypointExtractor, config: ModelConfig, golden: Golden
):
    stored = golden("b_motion_extractor")
    portrait = pose_from_raw(raw_pose(stored, "kps_ref"))
    driving = pose_from_raw(detect(extractor, stored["dri_frames_u8"], config))
    target = retarget(driving, frame_pose(driving, 0), portrait, config.keypoints)
    num_frames = len(stored["interp_online"]) - len(stored["dri_frames_u8"])
    start = interpolate_start(portrait, frame_pose(target, 0), num_frames)
    assert_within(join(start, target), stored["interp_online"], 1e-5)
    assert_within(posed_keypoints(driving), stored["interp_online_dri"], 1e-5)


@pytest.mark.golden("b_motion_extractor", "kps_ref.kp", "kps_frame1.kp", "dri2_frames_u8", "get_kps", "get_kps_dri")
def test_later_calls_are_relative_to_the_first_frame(extractor: KeypointExtractor, config: ModelConfig, golden: Golden):
    stored = golden("b_motion_extractor")
    portrait, first = (pose_from_raw(raw_pose(stored, name)) for name in ("kps_ref", "kps_frame1"))
    driving = pose_from_raw(detect(extractor, stored["dri2_frames_u8"], config))
    assert_within(join(retarget(driving, first, portrait, config.keypoints)), stored["get_kps"], 1e-5)
    assert_within(posed_keypoints(driving), stored["get_kps_dri"], 1e-5)


@pytest.mark.golden("b_motion_extractor", "kps_ref.kp", "dri_frames_u8", "dri2_frames_u8", "interp_offline")
def test_all_frames_at_once_give_the_same_as_call_by_call(
    extractor: KeypointExtractor, config: ModelConfig, golden: Golden
):
    stored = golden("b_motion_extractor")
    portrait = pose_from_raw(raw_pose(stored, "kps_ref"))
    driving = pose_from_raw(detect(extractor, torch.cat([stored["dri_frames_u8"], stored["dri2_frames_u8"]]), config))
    target = retarget(driving, frame_pose(driving, 0), portrait, config.keypoints)
    start = interpolate_start(portrait, frame_pose(target, 0), len(stored["interp_offline"]) - len(driving.degrees))
    assert_within(join(start, target), stored["interp_offline"], 1e-5)


def as_bytes(canvas: Tensor) -> Tensor:
    return (canvas * 255).round().byte()


@pytest.mark.golden("c_keypoints", "kps", "canvas", "canvas_index", "canvas_sum")
def test_drawn_keypoints(config: ModelConfig, golden: Golden):
    stored = golden("c_keypoints")
    canvases = draw(stored["kps"], config.size_px, config.keypoints)
    assert torch.equal(as_bytes(canvases[stored["canvas_index"]]), stored["canvas"])
    torch.testing.assert_close(canvases.double().sum(dim=(2, 3)), stored["canvas_sum"])


@pytest.mark.golden("c_keypoints", "kps", "canvas512_sum")
def test_drawn_keypoints_at_512(config: ModelConfig, golden: Golden):
    stored = golden("c_keypoints")
    canvases = draw(stored["kps"], 512, config.keypoints)
    torch.testing.assert_close(canvases.double().sum(dim=(2, 3)), stored["canvas512_sum"])


@pytest.mark.golden("c_keypoints", "kps", "canvas512_first")
def test_first_canvas_at_512(config: ModelConfig, golden: Golden):
    stored = golden("c_keypoints")
    assert torch.equal(as_bytes(draw(stored["kps"][:1], 512, config.keypoints)), stored["canvas512_first"])


@pytest.mark.golden("c_keypoints", "kps", "boxes", "boxes512")
def test_face_boxes(config: ModelConfig, golden: Golden):
    stored = golden("c_keypoints")
    assert torch.equal(boxes(stored["kps"], config.size_px, config.keypoints), stored["boxes"])
    assert torch.equal(boxes(stored["kps"], 512, config.keypoints), stored["boxes512"])


@pytest.mark.golden("d_pose_guider", "input_u8", "kps", "output")
def test_pose_guider(config: ModelConfig, weights_dir: Path, golden: Golden):
    network = PoseGuider(config.pose_guider, config.unet.block_channels[0])
    load(network, weights_dir / "personalive" / "pose_guider.pth")
    stored = golden("d_pose_guider")
    canvases = draw(stored["kps"], config.size_px, config.keypoints)
    assert torch.equal(as_bytes(canvases), by_frame(stored["input_u8"]))
    assert_within(network(canvases), by_frame(stored["output"]), 1e-5)


@pytest.mark.golden("i_vae_clip", "ref_u8", "ref_tensor")
def test_portrait_is_resized_exactly(config: ModelConfig, golden: Golden):
    stored = golden("i_vae_clip")
    assert torch.equal(portrait_tensor(stored["ref_u8"].numpy(), config.size_px), stored["ref_tensor"])


@pytest.mark.golden("i_vae_clip", "ref_u8", "mean", "logvar")
def test_vae_encodes(vae: Vae, config: ModelConfig, golden: Golden):
    stored = golden("i_vae_clip")
    portrait = portrait_tensor(stored["ref_u8"].numpy(), config.size_px)
    mean, logvar = vae.moments(portrait)
    assert_within(mean, stored["mean"], 1e-4)
    assert_within(logvar, stored["logvar"], 1e-4)
    assert_within(vae.encode(portrait), stored["mean"] * config.vae.scaling_factor, 1e-4)


@pytest.mark.golden("i_vae_clip", "dec_in", "dec_out")
def test_vae_decodes(vae: Vae, config: ModelConfig, golden: Golden):
    stored = golden("i_vae_clip")
    assert_within(vae.decode(stored["dec_in"] * config.vae.scaling_factor), stored["dec_out"], 1e-4)


@pytest.mark.golden("i_vae_clip", "ref_u8", "clip_pixels_online", "clip_pixels_offline")
def test_clip_preprocessing_is_exact(config: ModelConfig, golden: Golden):
    stored = golden("i_vae_clip")
    portrait, px = stored["ref_u8"].numpy(), config.image_encoder.image_px
    squeezed = np.asarray(Image.fromarray(portrait).resize((px, px)))
    assert torch.equal(clip_pixels(portrait, px), stored["clip_pixels_online"])
    assert torch.equal(clip_pixels(squeezed, px), stored["clip_pixels_offline"])


@pytest.mark.golden("i_vae_clip", "ref_u8", "embeds_online", "embeds_offline")
def test_image_encoder(image_encoder: ImageEncoder, config: ModelConfig, golden: Golden):
    stored = golden("i_vae_clip")
    portrait, px = stored["ref_u8"].numpy(), config.image_encoder.image_px
    squeezed = np.asarray(Image.fromarray(portrait).resize((px, px)))
    assert_within(image_encoder(clip_pixels(portrait, px)), stored["embeds_online"], 1e-4)
    assert_within(image_encoder(clip_pixels(squeezed, px)), stored["embeds_offline"], 1e-4)
