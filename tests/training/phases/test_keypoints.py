"""The two networks that look at a driving frame learn poses, expressions, and when nobody is there."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from stages.config import ModelConfig
from stages.errors import BadConfig
from stages.keypoints import box_is_usable, boxes, posed_keypoints
from stages.messages import Pose
from stages.networks.keypoint_extractor import RawPose
from stages.networks.motion_encoder import MotionEncoder
from stages.networks.upright import REACH
from training.clips import Batch
from training.identity import sample_identity
from training.known import read_expression
from training.motion import Motion, to_array
from training.phases import keypoints
from training.phases.keypoints import (
    NOWHERE,
    disturbed,
    heat_loss,
    keypoint_loss,
    prime_bottleneck,
    second_looks,
)
from training.phases.phase import draws
from training.world import render


def test_a_few_steps_reduce_the_loss(build, learn, batch: Batch):
    losses = learn(build("keypoints"), batch, 25)
    assert losses[-1] < 0.8 * losses[0]


def test_the_extractor_can_be_trained_alone(build, batch: Batch):
    phase = build("keypoints", motion_weight=0.0, turn_weight=0.0)
    names = {name for name, parameter in phase.named_parameters() if parameter.requires_grad}
    first_look = "networks.keypoint_extractor."
    assert names and all(name.startswith(first_look) and ".upright." not in name for name in names)
    metrics = phase(batch, draws(0, 0, 0, 0), 0, 0, None).metrics
    assert set(metrics) == {"error_pitch", "error_yaw", "error_roll"}


def test_the_second_look_can_be_trained_alone(build, learn, batch: Batch):
    phase = build("keypoints", motion_weight=0.0, pose_weight=0.0)
    names = {name for name, parameter in phase.named_parameters() if parameter.requires_grad}
    assert names and all(name.startswith("networks.keypoint_extractor.upright.") for name in names)
    assert set(phase(batch, draws(0, 0, 0, 0), 0, 0, None).metrics) == {"turn_pitch", "turn_yaw", "turn_roll"}
    losses = learn(phase, batch, 40)
    assert np.mean(losses[-8:]) < 0.8 * np.mean(losses[:8])


def test_the_motion_encoder_can_be_trained_alone_and_something_has_to_be(build, learn, batch: Batch):
    phase = build("keypoints", pose_weight=0.0, turn_weight=0.0)
    extractor = phase.networks["keypoint_extractor"]
    assert not any(parameter.requires_grad for parameter in extractor.parameters())
    assert "error_gaze_y" in phase(batch, draws(0, 0, 0, 0), 0, 0, None).metrics
    losses = learn(phase, batch, 15)
    assert losses[-1] < 0.95 * losses[0]
    with pytest.raises(BadConfig, match="nothing is learned"):
        build("keypoints", pose_weight=0.0, turn_weight=0.0, motion_weight=0.0)


def test_squares_show_what_is_to_be_read_from_them_mirrored_or_not(monkeypatch):
    monkeypatch.setattr(keypoints, "SECOND_LOOK_OFF", (0.0, 0.0, 0.0, 8.0))
    person, motion = sample_identity(5), Motion(pitch=8, yaw=-22, roll=6, x=0.1, y=-0.05, scale=0.55)
    image = torch.from_numpy(render(person, motion, 128)).permute(2, 0, 1)[None].float() / 255
    poses = np.repeat(to_array(motion)[None, :6], 12, 0)
    squares, degrees = second_looks(image.expand(12, -1, -1, -1), poses, 96, np.random.default_rng(0))
    assert degrees.dtype == torch.float32 and (degrees[:, 1] > 0).any() and (degrees[:, 1] < 0).any()

    def off(square: torch.Tensor, pitch: float, yaw: float, roll: float, is_mirrored: bool) -> float:
        shown = Motion(pitch=pitch, yaw=yaw, roll=roll, scale=1 / REACH)
        drawn = torch.from_numpy(render(person, shown, 96)).permute(2, 0, 1).float() / 127.5 - 1
        head = torch.hypot(*torch.meshgrid(*[torch.linspace(-1, 1, 96)] * 2, indexing="ij")) < 0.7
        return float(((drawn.flip(-1) if is_mirrored else drawn) - square).abs()[:, head].mean())

    for square, (pitch, yaw, roll) in zip(squares, degrees.tolist(), strict=True):
        is_mirrored = yaw > 0
        sign = -1 if is_mirrored else 1
        right = off(square, pitch, sign * yaw, sign * roll, is_mirrored)
        wrong = off(square, pitch, sign * yaw, sign * roll + 2 * np.copysign(4, roll), is_mirrored)
        assert right < 0.12 and (abs(roll) < 2 or right < wrong)


def test_a_frozen_look_keeps_its_norms_statistics(build, batch: Batch):
    for phase in (build("keypoints", turn_weight=0.0), build("mover", poses="extractor", expressions="encoder")):
        kept = {name: part.clone() for name, part in phase.named_buffers() if ".upright." in name}
        phase.train()(batch, draws(0, 0, 0, 0), 0, 0, None)
        assert kept and all(torch.equal(part, kept[name]) for name, part in phase.named_buffers() if name in kept)


def test_a_primed_encoder_reads_its_single_channel_stretch_by_stretch(config: ModelConfig):
    encoder = MotionEncoder(config.motion_encoder)
    prime_bottleneck(encoder, config.motion_encoder)
    cells = torch.full((1, 16), 1.5)
    cells[0, 2:4] += 0.4
    with torch.no_grad():
        tokens = encoder.final_proj(encoder.model.fc(cells)).unflatten(-1, (5, 12)) + encoder.pe
        read = read_expression(tokens, encoder, config.motion_encoder)[0]
    assert read.argmax() == 1


def test_the_taught_absence_of_a_person_is_an_unusable_box(config: ModelConfig):
    pose = Pose(
        canonical=np.random.default_rng(0).normal(size=(1, 21, 3)).astype(np.float32),
        degrees=np.zeros((1, 3), np.float32),
        translation=np.array([NOWHERE], np.float32),
        scale=np.full((1, 1), 0.05, np.float32),
    )
    assert not box_is_usable(boxes(posed_keypoints(pose), config.size_px, config.keypoints)[0])


def test_pictures_without_a_person_are_among_the_disturbed_ones(batch: Batch):
    present = np.array([True, False, True])
    rng = np.random.default_rng(0)
    images, poses = disturbed(batch.pixels[0, :3], batch.motions[0, :3, :6], present, 0.5, 32, rng)
    assert images.shape == (3, 3, 32, 32) and 0 <= images.min() <= images.max() <= 1
    assert np.array_equal(poses[1], batch.motions[0, 1, :6]) and not np.array_equal(poses[0], batch.motions[0, 0, :6])


def raw_pose(canonical: torch.Tensor, pose: torch.Tensor) -> RawPose:
    """What a perfect extractor answers: sharp peaks on whole bins."""
    bins = torch.arange(66.0)
    logits = [-10 * (bins - ((pose[:, index, None] + 97.5) / 3)).square() for index in range(3)]
    return RawPose(canonical.flatten(1), *logits, torch.nn.functional.pad(pose[:, 3:5], (0, 1)), pose[:, 5:])


def test_a_perfect_answer_costs_nothing_and_absence_is_judged_apart():
    canonical = torch.randn(2, 21, 3, generator=torch.Generator().manual_seed(0))
    pose = torch.tensor([[4.5, -10.5, 1.5, 0.1, 0.0, 0.6], [0.0, 1.5, 4.5, *NOWHERE[:2], 0.0]])
    loss, errors = keypoint_loss(raw_pose(canonical, pose), canonical, pose, torch.tensor([True, False]))
    assert float(loss) < 1e-3 and float(errors["error_yaw"]) < 1e-3
    worse, _ = keypoint_loss(raw_pose(canonical, pose), canonical, pose + 0.1, torch.tensor([True, False]))
    assert worse > loss + 0.01


def test_heat_is_judged_by_its_mean_for_keypoints_inside_the_picture():
    right, wrong = torch.full((1, 2, 4, 4), -9.0), torch.full((1, 2, 4, 4), -9.0)
    right[0, :, 1, 2] = wrong[0, :, 3, 0] = 9.0
    places = torch.tensor([[[0.25, -0.25], [1.5, 0.0]]])
    # Both distances are 1, of one of two keypoints.
    assert float(heat_loss(wrong, places) - heat_loss(right, places)) > 8 * 1 / 2
    assert float(heat_loss(wrong, places + 2)) == 0


def test_heat_is_judged_by_its_surprise_where_means_are_equal():
    single, pair, other = (torch.full((1, 1, 5, 5), -9.0) for _ in range(3))
    single[0, 0, 2, 2] = pair[0, 0, 1, 0] = pair[0, 0, 3, 4] = other[0, 0, 0, 1] = other[0, 0, 4, 3] = 9.0
    assert float(heat_loss(single, torch.zeros(1, 1, 2)) - heat_loss(pair, torch.zeros(1, 1, 2))) < -0.005
    # The pair's lower cell lies nearer to this place than the other's, which is its transpose.
    place = torch.tensor([[[0.8, 0.4]]])
    assert heat_loss(pair, place) < heat_loss(other, place)


def test_a_loss_is_the_same_in_mixed_precision():
    canonical, heat = torch.randn(2, 5, 3), torch.randn(2, 5, 8, 8)
    pose = torch.tensor([[4.1, -9.7, 1.3, 0.13, 0.02, 0.61], [3.3, 1.7, 4.4, -0.21, 0.11, 0.57]])
    raw, there = replace(raw_pose(canonical, pose + 0.1), heat=heat), torch.tensor([True, True])
    exact, _ = keypoint_loss(raw, canonical, pose, there)
    with torch.autocast("cpu", torch.bfloat16):
        mixed, _ = keypoint_loss(raw, canonical, pose, there)
    assert torch.equal(exact, mixed)


def test_a_loss_counts_the_heat_of_those_who_are_there():
    canonical, pose = torch.randn(1, 2, 3, generator=torch.Generator().manual_seed(0)), torch.zeros(1, 6)
    blind = raw_pose(canonical, pose)
    seen = replace(blind, heat=torch.zeros(1, 2, 4, 4))
    there, absent = torch.tensor([True]), torch.tensor([False])
    assert keypoint_loss(seen, canonical, pose, there)[0] > keypoint_loss(blind, canonical, pose, there)[0]
    assert keypoint_loss(seen, canonical, pose, absent)[0] == keypoint_loss(blind, canonical, pose, absent)[0]
